// What every view is made of: HTML and SVG elements. Views follow in the same module.

const SVG = "http://www.w3.org/2000/svg";
// JupyterLab takes keys on a button for commands (d d deletes the cell), but not below such an attribute.
function keepKey({ target, key, shiftKey, ctrlKey, metaKey, altKey }) {
  const isTheirs = key !== "Backspace" && (ctrlKey || metaKey || altKey || (shiftKey && key === "Enter"));
  if (target.closest?.(".l4-app, .l4-view, .l4-board, .l4-prompt")) target.toggleAttribute("data-lm-suppress-shortcuts", !isTheirs);
}
if (!globalThis.llama4Keys) addEventListener("keydown", (globalThis.llama4Keys = keepKey), true); // first, and once a page

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function put(node, parent, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

const make = (tag, parent, properties = {}, attributes = {}) => put(Object.assign(document.createElement(tag), properties), parent, attributes);

const draw = (tag, parent, attributes, textContent = "") => put(Object.assign(document.createElementNS(SVG, tag), { textContent }), parent, attributes);

// A text that is written once more, though it is the same, is laid out once more.
const write = (node, text) => node.textContent === text || (node.textContent = text);
