// The live view of a RouterExplorer, after elements.js. It draws from the trait `routing` (words, and
// the routers' numbers as bytes) and moves `layer` and `token`; a typed text goes to Python as {run}.

const BUSY_AFTER = 500; // milliseconds
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

// ---- data

function unpack(message) {
  const array = (Type, view) => new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  const routing = {
    ...message,
    expert: array(Int16Array, message.expert),
    runnerUp: array(Int16Array, message.runnerUp),
    score: array(Float32Array, message.score),
    margin: array(Float32Array, message.margin),
    logits: array(Float32Array, message.logits),
    load: array(Float32Array, message.load),
    tokenCount: message.tokens.length,
    expertCount: message.colours.length,
  };
  routing.topk = routing.expert.length / routing.margin.length;
  // where a layer's (row's) decision about a token stands among the margins
  routing.at = (row, token) => row * routing.tokenCount + token;
  routing.first = (row, token) => routing.expert[routing.at(row, token) * routing.topk];
  routing.chosen = (row, token) => {
    const start = routing.at(row, token) * routing.topk;
    return [...routing.expert.slice(start, start + routing.topk)];
  };
  return routing;
}

function describe(routing, row, token) {
  const at = routing.at(row, token);
  const chosen = routing
    .chosen(row, token)
    .map((expert, i) => `expert ${expert} with score ${routing.score[at * routing.topk + i].toFixed(2)}`);
  const margin = `, margin ${routing.margin[at].toFixed(2)} logits over expert ${routing.runnerUp[at]}`;
  return (
    `layer ${routing.layers[row]}, token ${token} ‘${routing.words[token]}’: ${chosen.join(" and ")}` +
    (routing.runnerUp[at] >= 0 ? margin : "")
  );
}

// ---- the view

function render({ model, el }) {
  let routing; // unpacked
  let pointed = null; // {row, token} under the mouse, shown before it is chosen
  let words = []; // one element a token
  let cell = { width: 0, height: 0 }; // of the map, in pixels

  const root = make("div", el, { className: "l4-router" });
  const tip = make("div", root, { className: "l4-tip", hidden: true });
  const prompt = addPrompt();
  const controls = make("div", root, { className: "l4-controls" });
  const slider = addSlider();
  const legend = make("div", controls, { className: "l4-legend" });
  const strip = addStrip();
  const summary = make("p", root, { className: "l4-summary" }, { role: "status" });
  const map = addMap();
  const charts = make("div", root, { className: "l4-charts" });
  const router = addChart("Router probabilities");
  const load = addChart("Load");

  // -- choosing

  const selected = () => ({
    row: Math.max(routing.layers.indexOf(model.get("layer")), 0),
    token: clamp(model.get("token"), 0, routing.tokenCount - 1),
  });

  function choose(row, token) {
    pointed = null;
    model.set("layer", routing.layers[clamp(row, 0, routing.layers.length - 1)]);
    model.set("token", clamp(token, 0, routing.tokenCount - 1));
    model.save_changes();
  }

  function point(place) {
    if (place?.row === pointed?.row && place?.token === pointed?.token) return;
    pointed = place;
    showDetails();
  }

  function onKey(event) {
    const { row, token } = selected();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in ARROWS) choose(row + ARROWS[event.key][0], token + ARROWS[event.key][1]);
    else if (event.key === "Home") choose(row, 0);
    else if (event.key === "End") choose(row, routing.tokenCount - 1);
    else return;
    event.preventDefault();
  }

  // Points with the mouse, chooses by click, and by keys while `focused` has the focus.
  function letChoose(node, focused, placeOf) {
    node.addEventListener("pointermove", (event) => {
      const place = placeOf(event);
      point(place);
      showTip(event, place ? describe(routing, place.row, place.token) : "");
    });
    node.addEventListener("pointerleave", (event) => {
      point(null);
      showTip(event, "");
    });
    node.addEventListener("click", (event) => {
      const place = placeOf(event);
      if (place) choose(place.row, place.token);
      focused.focus({ preventScroll: true });
    });
    focused.addEventListener("keydown", onKey);
  }

  function showTip(event, text) {
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const box = root.getBoundingClientRect();
    const left = event.clientX - box.left + 14;
    tip.style.left = `${clamp(left, 0, Math.max(box.width - tip.offsetWidth - 4, 0))}px`;
    tip.style.top = `${event.clientY - box.top + 18}px`;
  }

  // Shows all of one expert's tokens in the strip while the mouse is on its bar or legend.
  function spotlight(node, expert) {
    const shine = (isOn) => {
      words.forEach((word, token) => {
        const isChosen = routing.chosen(selected().row, token).includes(expert);
        word.classList.toggle("l4-dim", isOn && !isChosen);
      });
    };
    node.addEventListener("pointerenter", () => shine(true));
    node.addEventListener("pointerleave", () => shine(false));
  }

  function watchBar(bar, expert, text) {
    bar.addEventListener("pointermove", (event) => showTip(event, text));
    bar.addEventListener("pointerleave", (event) => showTip(event, ""));
    spotlight(bar, expert);
  }

  // -- parts that stay

  function addPrompt() {
    const form = make("form", root, { className: "l4-prompt" });
    const hint = "Enter runs the text, Shift+Enter starts a new line";
    const field = make("textarea", form, { rows: 1, spellcheck: false, title: hint }, { ...OWN_KEYS, "aria-label": "prompt" });
    const button = make("button", form, { type: "submit", textContent: "Run", title: "Run this text (Enter)" }, OWN_KEYS);
    const problem = make("p", root, { className: "l4-problem" }, { role: "alert" });
    let timer;
    const fit = () => {
      field.style.height = "auto";
      field.style.height = `${Math.min(field.scrollHeight + 2, 150)}px`;
    };
    const setBusy = (isBusy) => {
      root.classList.toggle("l4-busy", isBusy);
      root.setAttribute("aria-busy", isBusy);
      button.textContent = isBusy ? "Running …" : "Run";
    };
    const answered = (answer) => {
      clearTimeout(timer);
      setBusy(false);
      button.disabled = false;
      problem.textContent = answer.problem;
    };
    field.addEventListener("input", fit);
    field.addEventListener("keydown", (event) => {
      event.stopPropagation(); // JupyterLab would refuse the line break of Shift+Enter
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (button.disabled) return;
      button.disabled = true;
      problem.textContent = "";
      timer = setTimeout(setBusy, BUSY_AFTER, true);
      model.send({ run: field.value });
    });
    return { form, field, fit, answered };
  }

  function addSlider() {
    const label = make("label", controls, { className: "l4-layer" });
    make("span", label, { textContent: "Layer" });
    const input = make("input", label, { type: "range", min: 0 }, { ...OWN_KEYS, "aria-label": "layer" });
    const output = make("span", label, { className: "l4-layer-name" });
    input.addEventListener("input", () => choose(Number(input.value), selected().token));
    return { input, output };
  }

  function addStrip() {
    const strip = make("div", root, { className: "l4-strip", tabIndex: 0 }, {
      ...OWN_KEYS,
      id: `l4-${crypto.getRandomValues(new Uint32Array(1))[0]}`,
      role: "listbox",
      "aria-label": "tokens, coloured by the chosen expert; left and right arrows choose a token, up and down a layer",
    });
    letChoose(strip, strip, (event) => {
      const token = words.indexOf(event.target.closest('[role="option"]'));
      return token < 0 ? null : { row: selected().row, token };
    });
    return strip;
  }

  function addMap() {
    const figure = make("figure", root, { className: "l4-map" });
    make("figcaption", figure, { innerHTML: "<b>Chosen expert</b> by layer (down) and token (across)" });
    const grid = make("div", figure, { className: "l4-grid" });
    const layers = make("div", grid, { className: "l4-layers" });
    const scroll = make("div", grid, { className: "l4-scroll", tabIndex: 0 }, {
      ...OWN_KEYS,
      role: "application",
      "aria-label": "map of the chosen experts; arrow keys choose a layer and a token",
    });
    const sheet = make("div", scroll, { className: "l4-sheet" });
    const names = make("div", sheet, { className: "l4-names" });
    const canvas = make("canvas", sheet);
    const rowFrame = make("div", sheet, { className: "l4-row-frame" });
    const cellFrame = make("div", sheet, { className: "l4-cell-frame" });
    letChoose(canvas, scroll, (event) => {
      const box = canvas.getBoundingClientRect();
      return {
        row: clamp(Math.floor((event.clientY - box.top) / cell.height), 0, routing.layers.length - 1),
        token: clamp(Math.floor((event.clientX - box.left) / cell.width), 0, routing.tokenCount - 1),
      };
    });
    return { layers, scroll, sheet, names, canvas, rowFrame, cellFrame };
  }

  function addChart(title) {
    const figure = make("figure", charts);
    const caption = make("figcaption", figure);
    make("b", caption, { textContent: title });
    const place = make("span", caption);
    const note = make("small", figure);
    const svg = draw("svg", figure, { role: "img" });
    return { svg, place, note };
  }

  // -- drawing: everything, what the layer changes, what the place changes, what pointing changes

  function showText() {
    prompt.field.value = model.get("text");
    prompt.fit();
  }

  function showRouting() {
    routing = unpack(model.get("routing"));
    pointed = null;
    slider.input.max = routing.layers.length - 1;
    slider.input.disabled = routing.layers.length === 1;
    strip.replaceChildren();
    words = routing.words.map(addWord);
    legend.replaceChildren();
    if (routing.expertCount <= 32) routing.colours.forEach(addLegend);
    else legend.textContent = `${routing.expertCount} by number; colours repeat`;
    layOutMap();
    showLayer();
  }

  // Sets a token like text: its signs, the expert's number, and after them the real line break.
  function addWord(word, token) {
    if (word.startsWith("·")) make("wbr", strip);
    const node = make("span", strip, { id: `${strip.id}-${token}` }, { role: "option" });
    const end = Math.max(word.lastIndexOf("↵"), word.lastIndexOf("␍")) + 1;
    node.append(end ? word.slice(0, end) : word);
    if (/^<\|.*\|>$/.test(word)) node.classList.add("l4-special");
    make("sub", node);
    if (end) node.append("\n", word.slice(end));
    return node;
  }

  function addLegend(colour, expert) {
    const chip = make("span", legend, { textContent: expert, title: `tokens of expert ${expert}` });
    chip.style.background = colour;
    chip.style.color = routing.inks[expert];
    spotlight(chip, expert);
  }

  function layOutMap() {
    const { layers, scroll, sheet, names, canvas } = map;
    const rows = routing.layers.length;
    const count = routing.tokenCount;
    cell = {
      width: clamp((scroll.clientWidth - 2) / count, 7, 34),
      height: rows <= 12 ? 22 : rows <= 28 ? 16 : 11,
    };
    const width = cell.width * count;
    const height = cell.height * rows;
    const isRoomy = cell.width >= 12;
    sheet.style.width = `${width}px`;
    names.replaceChildren();
    names.className = isRoomy ? "l4-names l4-roomy" : "l4-names";
    for (let token = 0; token < count; token += isRoomy ? 1 : 10) {
      const text = isRoomy ? routing.words[token] : token;
      make("span", names, { textContent: text }).style.left = `${cell.width * (token + (isRoomy ? 0.5 : 0))}px`;
    }
    layers.replaceChildren();
    layers.style.paddingTop = `${names.offsetHeight}px`;
    const every = cell.height < 14 ? 4 : 1;
    routing.layers.forEach((layer, row) => {
      const name = make("div", layers, { title: `layer ${layer}`, textContent: row % every ? "" : layer });
      name.style.height = `${cell.height}px`;
      name.addEventListener("click", () => choose(row, selected().token));
    });
    const sharp = window.devicePixelRatio || 1;
    canvas.width = width * sharp;
    canvas.height = height * sharp;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const paint = canvas.getContext("2d");
    paint.scale(sharp, sharp);
    paint.font = `${cell.height > 20 ? 11 : 9}px sans-serif`;
    paint.textAlign = "center";
    paint.textBaseline = "middle";
    const gap = cell.width > 9 ? 1 : 0;
    const isNumbered = cell.height >= 14 && cell.width >= 5 + 7 * String(routing.expertCount - 1).length;
    for (let row = 0; row < rows; row++) {
      for (let token = 0; token < count; token++) {
        const expert = routing.first(row, token);
        const left = Math.round(token * cell.width);
        const right = Math.round((token + 1) * cell.width) - gap;
        const top = row * cell.height;
        paint.fillStyle = routing.colours[expert];
        paint.fillRect(left, top, right - left, cell.height - 1);
        if (!isNumbered) continue;
        paint.fillStyle = routing.inks[expert];
        paint.fillText(expert, (left + right) / 2, top + cell.height / 2);
      }
    }
  }

  function showLayer() {
    const { row } = selected();
    slider.input.value = row;
    slider.input.setAttribute("aria-valuetext", `layer ${routing.layers[row]}`);
    slider.output.textContent = `${routing.layers[row]} of ${routing.layers[0]}–${routing.layers.at(-1)}`;
    words.forEach((word, i) => {
      const expert = routing.first(row, i);
      word.style.setProperty("--expert", routing.colours[expert]);
      word.style.setProperty("--on-expert", routing.inks[expert]);
      word.querySelector("sub").textContent = routing.chosen(row, i).join(",");
    });
    [...map.layers.children].forEach((name, i) => name.classList.toggle("l4-current", i === row));
    showPlace();
  }

  function showPlace() {
    const { row, token } = selected();
    strip.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
    words[token].setAttribute("aria-selected", "true");
    strip.setAttribute("aria-activedescendant", words[token].id);
    const top = `${map.names.offsetHeight + row * cell.height}px`;
    Object.assign(map.rowFrame.style, { top, height: `${cell.height - 1}px` });
    Object.assign(map.cellFrame.style, {
      top,
      left: `${token * cell.width}px`,
      width: `${cell.width}px`,
      height: `${cell.height}px`,
    });
    bringIntoView(token);
    showDetails();
  }

  function showDetails() {
    const { row, token } = pointed ?? selected();
    const experts = routing.expertCount;
    const chosen = routing.chosen(row, token);
    const start = routing.at(row, token) * experts;
    const probabilities = routing.logits.slice(start, start + experts).map((x) => 1 / (1 + Math.exp(-x)));
    const common = { colours: routing.colours, axis: "expert", chosen, each: watchBar };
    summary.setAttribute("aria-live", pointed ? "off" : "polite");
    summary.textContent = describe(routing, row, token);
    router.place.textContent = ` at token ${token} ‘${routing.words[token]}’, layer ${routing.layers[row]}`;
    router.note.textContent = "sigmoid(logit), each expert by itself: they do not sum to 1";
    drawBars(router.svg, probabilities, { ...common, step: 0.25, top: 1, label: (y) => y.toFixed(2) });
    const shares = routing.load.slice(row * experts, (row + 1) * experts);
    const highest = Math.max(...shares, 1.2 / experts);
    const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25].find((size) => highest / size <= 5);
    const all = routing.topk === 1 ? `${routing.tokenCount} tokens` : `${routing.tokenCount * routing.topk} choices`;
    load.place.textContent = ` of layer ${routing.layers[row]}: share of ${all} by expert`;
    load.note.textContent = `dashed: ${percent(1 / experts)}, were all used alike`;
    const top = Math.ceil(highest / step) * step;
    drawBars(load.svg, shares, { ...common, step, top, label: percent, reference: 1 / experts });
  }

  // Scrolls the strip and the map, and never the page, to the chosen token.
  function bringIntoView(token) {
    const { offsetTop, offsetHeight } = words[token];
    strip.scrollTop = clamp(strip.scrollTop, offsetTop + offsetHeight + 8 - strip.clientHeight, offsetTop - 8);
    const left = token * cell.width;
    map.scroll.scrollLeft = clamp(map.scroll.scrollLeft, left + 3 * cell.width - map.scroll.clientWidth, left - 2 * cell.width);
  }

  // -- wiring

  const listeners = {
    "change:text": showText,
    "change:routing": showRouting,
    "change:layer": showLayer,
    "change:token": showPlace,
    "msg:custom": prompt.answered,
  };
  for (const [name, listener] of Object.entries(listeners)) model.on(name, listener);
  const resized = new ResizeObserver(() => {
    layOutMap();
    showLayer();
    prompt.fit();
  });
  prompt.form.hidden = !model.get("is_live");
  showText();
  showRouting();
  resized.observe(map.scroll);
  return () => {
    resized.disconnect();
    for (const [name, listener] of Object.entries(listeners)) model.off(name, listener);
  };
}

export default { render };
