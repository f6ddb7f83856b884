// What every view is made of: HTML and SVG elements, and a bar chart. Views follow in the same module.

const SVG = "http://www.w3.org/2000/svg";
const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" }; // on what has the focus, or Lab takes its keys

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function make(tag, parent, properties = {}, attributes = {}) {
  const node = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

function draw(tag, parent, attributes, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  parent.append(node);
  return node;
}

// A text that is written once more, though it is the same, is laid out once more.
const write = (node, text) => node.textContent === text || (node.textContent = text);

// Draws one bar a height, named by its position and coloured by `colours`, with rules every `step`
// up to `top` and a dashed line at `reference`. Bars in `chosen` are framed. `label` writes a value;
// `each(bar, position, text)` gets every bar's element; `ghosts` are heights to compare with.
function drawBars(svg, heights, { colours, axis, step, top, label, reference, ghosts, chosen, each }) {
  const width = svg.parentElement.wide;
  if (!width) return; // not in the page yet; whoever watches the size draws later
  const [left, right, above, below, tall] = [46, 8, 24, 34, 200];
  const pitch = (width - left - right) / heights.length;
  const y = (value) => tall - below - (value / top) * (tall - above - below);
  const letter = (parent, x, y, text, anchor) => draw("text", parent, { x, y, "text-anchor": anchor }, text);
  const rule = (value, css) =>
    draw("line", svg, { x1: left, x2: width - right, y1: y(value), y2: y(value), class: css });
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${tall}`);
  svg.setAttribute("height", tall);
  svg.setAttribute("aria-label", Array.from(heights, (height, i) => `${axis} ${i}: ${label(height)}`).join(", "));
  for (let value = 0; value <= top + step / 2; value += step) {
    rule(value, "l4-rule");
    letter(svg, left - 6, y(value) + 4, label(value), "end");
  }
  if (reference) rule(reference, "l4-reference");
  heights.forEach((height, i) => {
    const middle = left + pitch * (i + 0.5);
    const bar = draw("g", svg, { class: chosen.includes(i) ? "l4-chosen" : "" });
    const box = { x: middle - pitch * 0.38, width: pitch * 0.76 };
    draw("rect", bar, { ...box, y: 0, height: tall, fill: "transparent" }); // easy to point at
    draw("rect", bar, { ...box, y: y(height), height: y(0) - y(height), fill: colours[i], class: "l4-bar-box" });
    if (ghosts) draw("line", bar, { x1: box.x, x2: box.x + box.width, y1: y(ghosts[i]), y2: y(ghosts[i]), class: "l4-ghost" });
    if (pitch >= 34) letter(bar, middle, y(height) - 5, label(height), "middle");
    if (heights.length <= 32 || i % 8 === 0) letter(bar, middle, tall - below + 15, i, "middle");
    each(bar, i, `${axis} ${i}: ${label(height)}`);
  });
  letter(svg, (left + width) / 2, tall - 3, axis, "middle");
}
