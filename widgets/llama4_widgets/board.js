// The live view of a Board, after elements.js. Its trait `content` holds named arrays over named axes,
// and panels that draw them; what an axis does not show is picked by the selection, which all boards
// of a group share here, without waiting for Python.

const GROUPS = (globalThis.llama4Groups ??= new Map()); // group -> { selection, boards: what draws them anew }
const TYPES = { u1: Uint8Array, i2: Int16Array, f4: Float32Array };
let isDark = false; // the page; SCALES are those of colours.py
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-1e6, 0], End: [1e6, 0] };
// What may change of a panel that stays on the page; with anything else it is another panel.
const SAID = ["title", "note", "scale", "borders", "clean", "marks", "reference", "text", "columns", "rows", "bars", "choices"];
const SETTLE = 120; // milliseconds without a zoom before finer numbers are asked for
const FADED = { category: 0.45, sequential: 0.7, diverging: 0.65 }; // at most, behind words: they stay legible, in light and dark
const [LEFT, TOP, RIGHT, BOTTOM] = [46, 6, 8, 30]; // margins of a map, in pixels

// ---- numbers

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const stopsOf = ({ kind, colours }) => colours ?? SCALES[kind === "diverging" && isDark ? "dark" : kind];

function colourOf({ kind, low = 0, high = 1, colours }) {
  const [stops, grey] = [stopsOf({ kind, colours }).map(rgb), [128, 128, 128]]; // of what is no number
  if (kind === "category") return (value) => (value >= 0 ? stops[value % stops.length] : grey);
  return (value) => {
    const at = clamp((value - low) / (high - low || 1), 0, 1) * (stops.length - 1);
    const from = Math.min(Math.floor(at), stops.length - 2);
    return value !== value ? grey : stops[from].map((start, i) => start + (at - from) * (stops[from + 1][i] - start));
  };
}

// A number as people read it: few digits, and no more than the array keeps.
function written(value, unit = "") {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(value).toLocaleString("en") : Number.isInteger(value) ? value : size < 0.001 ? value.toExponential(1) : Number(value.toPrecision(3));
  return `${text}${unit && (unit === "%" ? " %" : ` ${unit}`)}`.replace("-", "−");
}

// Numbers on a scale of logarithms are told as what they are logarithms of.
const told = (value, scale) => written(scale?.log ? 10 ** value : value, scale?.unit);

class Values {
  constructor({ dtype, shape, axes, low, high, data, tile }) {
    const numbers = (bytes) => new TYPES[dtype](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
    Object.assign(this, { axes, tile, painted: new Map() }); // slices that were drawn as pictures
    this.size = (name) => shape[axes.indexOf(name)];
    this.strides = shape.map((_, i) => shape.slice(i + 1).reduce((a, b) => a * b, 1));
    this.pages = data ? null : new Set(); // those that are here, of an array that comes in parts
    this.raw = data ? numbers(data) : new TYPES[dtype](shape[0] * this.strides[0]);
    this.take = ({ page, data }) => this.pages.add(page) && this.raw.set(numbers(data), page * this.strides[0]);
    this.read = dtype === "u1" ? (i) => (this.raw[i] ? low + ((this.raw[i] - 1) * (high - low)) / 254 : NaN) : (i) => this.raw[i];
    this.isLate = (index) => Boolean(this.pages) && !this.pages.has(index(axes[0]));
  }
  // The number at given indices of some axes; `index(axis)` says the others.
  slice(shown, index) {
    let offset = 0;
    const steps = shown.map((name) => this.strides[this.axes.indexOf(name)]);
    this.axes.forEach((name, i) => shown.includes(name) || (offset += this.strides[i] * index(name)));
    return Object.assign((...at) => this.read(at.reduce((sum, k, i) => sum + k * steps[i], offset)), { offset });
  }
  // A slice of two axes as a canvas, a pixel for each number; "nothing there" is transparent.
  paint(shown, index, scale) {
    const value = this.slice(shown, index);
    const key = [value.offset, shown, JSON.stringify(scale), stopsOf(scale)].join();
    if (this.painted.has(key)) return this.painted.get(key);
    if (this.painted.size > 64) this.painted.clear();
    const [rows, cols] = shown.map(this.size);
    const [colour, image] = [colourOf(scale), new ImageData(cols, rows)];
    for (let k = 0; k < rows * cols; k++) {
      const v = value(Math.floor(k / cols), k % cols);
      if (v === v) image.data.set([...colour(v), 255], 4 * k);
    }
    const canvas = new OffscreenCanvas(cols, rows);
    canvas.getContext("2d").putImageData(image, 0, 0);
    this.painted.set(key, canvas);
    return canvas;
  }
}

// ---- the view

function render({ model, el, signal }) {
  const root = make("section", el, { className: "l4-board" });
  const heading = make("details", root, { className: "l4-heading" }); // as view.py makes it
  const head = make("summary", heading);
  const title = make("b", head);
  make("span", head, { textContent: "?" });
  const explanation = make("p", heading);
  const summary = make("p", root, { className: "l4-summary" }, { role: "status" });
  const problem = make("p", root, { className: "l4-problem" }, { role: "alert" });
  const body = make("div", root, { className: "l4-panels" });
  const tip = make("div", root, { className: "l4-tip", hidden: true });
  const name = model.get("group");
  const group = GROUPS.get(name) ?? { selection: model.get("selection"), boards: new Set() };
  GROUPS.set(name, group);
  let theme = {}; // colours; none while the board is not in the page
  let content, arrays; // the latter as Values
  let drawn = []; // of each panel: its figure, and the function that draws it anew
  let pointed = {}; // what is under the pointer, in fields of the selection
  const windows = new Map(); // what is on screen of maps that zoom together, by name
  group.boards.add(redraw);

  function select(change) {
    pointed = {};
    group.selection = { ...group.selection, ...change, seq: (group.selection.seq ?? 0) + 1 };
    for (const again of group.boards) again();
    model.set("selection", group.selection);
    model.save_changes();
  }

  // -- axes

  const axis = (name) => content.axes[name];
  function index(name, selection = group.selection) {
    const { select: field, values, size } = axis(name);
    const chosen = selection[field] ?? 0;
    return values ? Math.max(values.lastIndexOf(chosen), 0) : clamp(chosen, 0, size - 1);
  }
  // Whether the selection is one of an axis's places: a dense layer is none of the MoE layers.
  const isThere = (name) => axis(name)?.values?.includes(group.selection[axis(name).select]) ?? true;
  const seen = (name) => index(name, { ...group.selection, ...pointed }); // by bars and the summary
  const place = (name, i) => axis(name).values?.[i] ?? i; // what the selection calls an index
  function called(name, i) {
    const { title, labels } = axis(name);
    return title ? `${title} ${place(name, i)}${labels ? ` ‘${labels[i]}’` : ""}` : labels[i];
  }
  const choose = (pairs) => {
    const change = Object.fromEntries(pairs.filter(([name]) => axis(name).select).map(([name, i]) => [axis(name).select, place(name, i)]));
    if (Object.keys(change).length) select(change);
  };
  // Moves the selection along axes; from the first or last of the places that it stands for.
  const walk = (...steps) => choose(steps.map(([name, by]) => [name, clamp(by + (by < 0 ? (axis(name).values?.indexOf(place(name, index(name))) ?? index(name)) : index(name)), 0, axis(name).size - 1)]));
  const picked = (array, at = index) => (shown) => arrays[array].slice(shown, at);

  function describe(panel, indices, names = panel.axes.map((name, i) => called(name, indices[i])), array = panel.array) {
    const value = (array) => picked(array)(panel.axes)(...indices);
    const spoken = (value) => (panel.scale?.kind === "category" ? `${panel.scale.unit} ${written(value)}` : told(value, panel.scale));
    const before = panel.clean && value(panel.clean) !== value(array) ? ` (clean: ${spoken(value(panel.clean))})` : "";
    return `${names.join(", ")}: ${spoken(value(array))}${before}`;
  }

  function point(event, text) {
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const frame = root.getBoundingClientRect();
    tip.style.left = `${clamp(event.clientX - frame.left + 12, 0, frame.width - tip.offsetWidth - 4)}px`;
    tip.style.top = `${event.clientY - frame.top + (event.clientY + 20 + tip.offsetHeight > innerHeight ? -8 - tip.offsetHeight : 16)}px`;
  }

  const hover = (node, text) => Object.assign(node, { onpointermove: (event) => point(event, text()), onpointerleave: () => point() });
  // Arrow keys on a node move by so many places to the right and down; `press` takes other keys, or does not.
  function onKeys(node, move, press = () => false) {
    node.onkeydown = (event) => {
      const step = STEPS[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser's own, such as its zoom
      if (step ? (point(), move(...step, event.shiftKey), true) : press(event.key)) event.preventDefault(); // what was under the pointer is another now
    };
  }

  // -- what is selected, in words and in panels; what is not here yet stays as it was

  const isLate = (name, at = seen) => Boolean(arrays[name]?.isLate(at));

  function show({ panel, figure, again }) {
    if (!figure.wide) return; // whoever watches its size draws it
    const at = panel.kind === "bars" ? seen : index;
    const late = [panel.array, panel.clean, ...(panel.chosen ?? [])].some((name) => isLate(name, at));
    const picks = arrays[panel.array]?.axes.filter((name) => !panel.axes.includes(name)) ?? [];
    figure.classList.toggle("l4-late", late || !picks.every(isThere));
    if (!late) again();
  }

  function say() {
    const names = (text) => Array.from(text.matchAll(/\{([^{}:]+)/g), ([, name]) => name);
    const { sentence = "", otherwise = "", kept = {} } = content;
    const only = Object.entries(kept).filter(([field, value]) => group.selection[field] !== value).map((pair) => pair.join(" "));
    const [first, ...others] = names(sentence);
    if (others.some((name) => isLate(name))) return;
    const value = (name) => picked(name, seen)([])();
    const text = (others.every(isThere) ? (isThere(first) ? sentence : otherwise) : "") // of what is not on screen, the model's
      .replace(/\[(.*?)\]/g, (_, part) => (names(part).some((name) => value(name) < 0) ? "" : part))
      .replace(/\{([^{}:]+)(?::(\d))?\}/g, (_, name, digits) => {
        if (axis(name)) return called(name, seen(name));
        return digits && Number.isFinite(value(name)) ? (value(name) / 10 ** digits).toFixed(digits) : written(value(name));
      });
    summary.setAttribute("aria-live", Object.keys(pointed).length ? "off" : "polite");
    if (!summary.style.height) summary.style.minHeight = `${1.5 * Math.ceil((8 * text.length) / body.wide)}em`; // room for a longer one
    write(summary, text || `${only.length ? `Kept for ${only.join(", ")} only. ` : ""}${model.get("summary")}`);
  }

  // Shows what is under the pointer before it is chosen; nothing may move away from there.
  function look(place) {
    summary.style.height = Object.keys(place).length ? `${summary.getBoundingClientRect().height}px` : "";
    pointed = place;
    for (const each of drawn) if (each.panel.kind === "bars") show(each);
    say();
  }

  // -- kinds of panel: each adds its elements to a figure and returns the function that draws them

  const kinds = { strip: addStrip, map: addMap, multiples: addMultiples, bars: addBars, lines: addLines, picture: addPicture, words: addWords, table: addTable };

  function addStrip(figure, panel) {
    const [name] = panel.axes;
    const slide = panel.walk && addSlider(figure, panel.walk);
    const box = make("div", figure, { className: "l4-words", tabIndex: 0 }, { role: "listbox" });
    let [shown, numbers] = [null, []]; // the word last brought into sight, and arrays that are written at each
    const words = axis(name).labels.map((word, i) => {
      if (i && /^(·|<\||\\x)/.test(word)) make("wbr", box); // lines end between words, where that is possible
      const node = make("span", box, { textContent: word, onclick: () => choose([[name, i]]) }, { role: "option", "data-special": word.startsWith("<|") });
      if (word.includes("↵")) make("br", box);
      node.onpointerenter = () => look({ [axis(name).select]: place(name, i) });
      return Object.assign(hover(node, () => describe(panel, [i])), { onpointerleave: () => (point(), look({})) });
    });
    onKeys(box, (right, down) => walk([panel.walk && down ? panel.walk : name, right + down]));
    // Dims all words but those of an expert.
    const shine = (expert) => words.forEach((node, i) => node.classList.toggle("l4-dim", expert !== undefined && numbers.every((at) => at(i) !== expert)));
    const again = () => {
      slide?.();
      numbers = (panel.chosen ?? []).map((array) => picked(array)(panel.axes));
      const { kind, low, high } = panel.scale;
      const [value, colour] = [picked(panel.array)(panel.axes), colourOf({ colours: SCALES[kind], ...panel.scale })]; // on any paper
      const strength = (v) => FADED[kind] * (kind === "category" ? 1 : clamp(kind === "diverging" ? Math.abs(v) / high : (v - low) / (high - low), 0, 1));
      const at = axis(name).select ? index(name) : -1;
      const chosen = (box.ariaActiveDescendantElement = words[at] ?? null);
      box.setAttribute("aria-label", chosen ? `${panel.title}. ${describe(panel, [at])}` : panel.title);
      const reveal = () => chosen && chosen !== shown && (chosen.offsetTop < box.scrollTop || chosen.offsetTop > box.scrollTop + box.clientHeight - 24) && (box.scrollTop = chosen.offsetTop - 60);
      if (shown) reveal();
      words.forEach((node, i) => {
        const v = value(i);
        const [r, g, b] = kind === "sequential" ? [224, 139, 0] : colour(kind === "diverging" ? Math.sign(v || 0) * high : v);
        node.style.background = v === v ? `rgb(${r} ${g} ${b} / ${strength(v)})` : "none";
        node.classList.toggle("l4-nothing", v !== v);
        node.classList.toggle("l4-selected", i === at);
        node.setAttribute("aria-selected", i === at);
        if (!numbers.length) return;
        node.dataset.value = numbers.map((at) => at(i)).filter((number) => number >= 0);
        node.style.setProperty("--own", `rgb(${r} ${g} ${b})`);
      });
      if (!shown) reveal(); // the first time, what was just written has moved the lines
      shown = chosen;
    };
    return Object.assign(again, { shine });
  }

  // A slider along an axis that is picked, not drawn.
  function addSlider(figure, name) {
    const { title, size } = axis(name);
    const label = make("label", figure, { className: "l4-slider", textContent: title });
    const input = make("input", label, { type: "range", min: 0, max: size - 1 }, { "aria-label": title });
    const output = make("span", label);
    input.oninput = () => choose([[name, Number(input.value)]]);
    const all = Array.from({ length: size }, (_, i) => place(name, i));
    const range = all.at(-1) - all[0] === size - 1 ? `${all[0]}–${all.at(-1)}` : size > 6 ? `${all[0]}, ${all[1]}, …, ${all.at(-1)}` : all.join(", ");
    return () => {
      input.value = index(name);
      output.textContent = `${isThere(name) ? place(name, index(name)) : "none"} of ${range}`;
      input.setAttribute("aria-valuetext", `${title} ${output.textContent}`);
    };
  }

  function addMap(figure, panel) {
    const [down, across] = panel.axes;
    const canvas = make("canvas", figure, { tabIndex: 0 }, { role: "img" });
    const whole = { x: [0, axis(across).size], y: [0, axis(down).size] };
    const linked = panel.zoom ?? panel.name;
    if (JSON.stringify(windows.get(linked)?.whole) !== JSON.stringify(whole)) windows.set(linked, { whole, x: whole.x, y: whole.y });
    const window = windows.get(linked); // what is on screen, in cells
    // Names stand in the place of numbers where the axis is not one of the selection's.
    const named = (name, i) => (axis(name).labels && !axis(name).select ? axis(name).labels[i] : place(name, i));
    const longest = Math.max(...(axis(down).select ? [axis(down).size] : (axis(down).labels ?? [0])).map((name) => String(name).length));
    const left = LEFT + Math.max(whole.y[1] > 9999 ? 16 : 0, 6 * (longest - 3)); // room for long ones
    const isWhole = () => String([window.x, window.y]) === String([whole.x, whole.y]);
    const fingers = new Map(); // that are down, where each was last
    let timer, grabbed;
    const size = () => {
      const width = panel.square ? Math.min(figure.wide, 440 + left + RIGHT) : figure.wide;
      const inner = width - left - RIGHT;
      return { width, inner, tall: panel.square ? inner : clamp((whole.y[1] - whole.y[0]) * 20, 60, 320) };
    };
    const cell = (event) => {
      const frame = canvas.getBoundingClientRect();
      const { inner, tall } = size();
      const across = window.x[0] + ((event.clientX - frame.left - left) / inner) * (window.x[1] - window.x[0]);
      const down = window.y[0] + ((event.clientY - frame.top - TOP) / tall) * (window.y[1] - window.y[0]);
      return [Math.floor(down), Math.floor(across), down, across];
    };
    const isIn = ([y, x], { x: xs, y: ys }) => y >= ys[0] && y < ys[1] && x >= xs[0] && x < xs[1];
    // Moves the window by x and y cells and makes it `factor` times as large, around a place.
    function move(x, y, factor = 1, [, , middleY, middleX] = [0, 0, 0, 0]) {
      for (const [name, by, middle] of [["x", x, middleX], ["y", y, middleY]]) {
        const [[low, high], [from, to]] = [whole[name], window[name]];
        const length = clamp((to - from) * factor, Math.min(8, high - low), high - low);
        const start = clamp(by + middle - ((middle - from) / (to - from)) * length, low, high - length);
        window[name] = [start, start + length];
      }
      for (const each of drawn) each.again.lay?.();
      clearTimeout(timer);
      if (panel.region) timer = setTimeout(() => ask(linked), SETTLE);
    }
    const zoom = (factor, at) => (point(), move(0, 0, factor, at));
    if (panel.zoom) {
      canvas.onwheel = (event) => {
        if (!event.deltaY || (event.deltaY > 0 && isWhole())) return; // the page scrolls
        event.preventDefault();
        zoom(event.deltaY > 0 ? 1.25 : 0.8, cell(event));
      };
      canvas.ontouchstart = (event) => void (event.touches.length > 1 && event.preventDefault()); // or two fingers scroll the page
      canvas.ondblclick = () => zoom(1e9, cell({ clientX: 0, clientY: 0 }));
    }
    canvas.onpointerdown = (event) => {
      grabbed = event.button || fingers.size ? null : { at: cell(event), x: event.clientX, y: event.clientY, moved: false };
      fingers.set(event.pointerId, event);
      canvas.setPointerCapture(event.pointerId);
    };
    canvas.onpointermove = (event) => {
      const [at, last] = [cell(event), fingers.get(event.pointerId)];
      if (!last || !panel.zoom) return point(event, isIn(at, whole) && tell(at));
      const other = [...fingers.values()].find((each) => each !== last);
      const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
      if (other) zoom(apart(last) / apart(event) || 1, cell(other)); // a pinch: what is below the other finger stays
      fingers.set(event.pointerId, event);
      if (grabbed) grabbed.moved ||= Math.hypot(event.clientX - grabbed.x, event.clientY - grabbed.y) > 4;
      if (grabbed?.moved) move(grabbed.at[3] - at[3], grabbed.at[2] - at[2]);
    };
    canvas.onpointerup = (event) => {
      const at = cell(event);
      if (grabbed && !grabbed.moved && isIn(at, whole)) choose([[down, at[0]], [across, at[1]]]);
    };
    canvas.onlostpointercapture = ({ pointerId }) => ((grabbed = null), fingers.delete(pointerId));
    canvas.onpointerleave = () => point();
    const steer = (right, low, isShift) => (isShift && panel.zoom ? move((right * (window.x[1] - window.x[0])) / 8, (low * (window.y[1] - window.y[0])) / 8) : walk([across, right], [down, low]));
    onKeys(canvas, steer, (key) => {
      const [factor, y, x] = [{ "+": 0.7, "-": 1.4, 0: 1e9 }[key], index(down), axis(across).select ? index(across) : index(down)];
      if (factor && panel.zoom) zoom(factor, [0, 0, clamp(y, ...window.y), clamp(x, ...window.x)]);
      return factor && panel.zoom;
    });
    // Arrays may be pooled: each of their cells stands for several places, of a part of the axes.
    const tile = (array) => {
      const [rows, cols] = panel.axes.map(arrays[array].size);
      return { ...(arrays[array].tile ?? { x: [0, cols], y: [0, rows] }), rows, cols };
    };
    const layers = () => [panel.array, panel.region].filter((array) => arrays[array]); // the finest last
    function tell(at) {
      const array = layers().findLast((each) => isIn(at, tile(each))) ?? panel.array;
      const { x: xs, y: ys, rows, cols } = tile(array);
      const [tall, wide] = [(ys[1] - ys[0]) / rows, (xs[1] - xs[0]) / cols]; // places in a cell
      const indices = [clamp(Math.floor((at[0] - ys[0]) / tall), 0, rows - 1), clamp(Math.floor((at[1] - xs[0]) / wide), 0, cols - 1)];
      const names = [[down, ys[0] + indices[0] * tall, tall], [across, xs[0] + indices[1] * wide, wide]].map(([name, from, count]) =>
        count > 1 ? `${axis(name).title} ${place(name, Math.round(from))}–${place(name, Math.min(Math.round(from + count), axis(name).size) - 1)}` : called(name, Math.round(from)),
      );
      return describe(panel, indices, names, array);
    }
    const again = () => {
      const { width, inner, tall } = size();
      if (inner <= 0) return;
      const [ratio, pen] = [globalThis.devicePixelRatio || 1, canvas.getContext("2d")];
      const [w, h] = [width, tall + TOP + BOTTOM].map((length) => Math.floor(length * ratio));
      if (canvas.width === w && canvas.height === h) pen.reset(); // what keeps its size needs no new layout
      else Object.assign(Object.assign(canvas, { width: w, height: h }).style, { width: `${width}px`, height: `${tall + TOP + BOTTOM}px` });
      const px = (x) => left + ((x - window.x[0]) / (window.x[1] - window.x[0])) * inner;
      const py = (y) => TOP + ((y - window.y[0]) / (window.y[1] - window.y[0])) * tall;
      if (panel.zoom) canvas.style.touchAction = isWhole() ? "pan-x pan-y" : "none"; // one finger scrolls the page, or moves a part
      pen.scale(ratio, ratio);
      Object.assign(pen, { imageSmoothingEnabled: false }).save();
      pen.rect(left, TOP, inner, tall);
      pen.clip();
      for (const array of layers()) {
        const { x: xs, y: ys } = tile(array);
        const place = [px(xs[0]), py(ys[0]), px(xs[1]) - px(xs[0]), py(ys[1]) - py(ys[0])];
        Object.assign(pen, { fillStyle: theme.ground }).fillRect(...place);
        pen.drawImage(arrays[array].paint(panel.axes, index, panel.scale), ...place);
      }
      const [rows, cols] = panel.axes.map(arrays[panel.array].size);
      const [value, clean, marks] = [panel.array, panel.clean, panel.marks].map((array) => array && picked(array)(panel.axes));
      const isMarked = marks ?? (clean && ((i, j) => clean(i, j) !== value(i, j))); // gets a ring
      const isNumbered = panel.scale.inks && inner / cols >= 14 && tall / rows >= 12 && !panel.zoom;
      const radius = clamp(Math.min(inner / cols, tall / rows) / 2 - 1, 2, 4);
      Object.assign(pen, { font: "11px system-ui, sans-serif", textAlign: "center", strokeStyle: "#000", lineWidth: radius / 2 });
      for (let k = 0; (isNumbered || isMarked) && k < rows * cols; k++) {
        const [i, j] = [Math.floor(k / cols), k % cols];
        const [x, y] = [(px(j) + px(j + 1)) / 2, (py(i) + py(i + 1)) / 2];
        const ring = isNumbered ? [px(j + 1) - radius - 1, py(i) + radius + 1] : [x, y]; // not over the number
        if (isNumbered) {
          Object.assign(pen, { fillStyle: theme.ground }).fillRect(px(j + 1) - 1, py(i), 1, py(i + 1) - py(i));
          pen.fillRect(px(j), py(i + 1) - 1, px(j + 1) - px(j), 1);
          pen.fillStyle = panel.scale.inks[value(i, j) % panel.scale.inks.length];
          if (value(i, j) >= 0) pen.fillText(value(i, j), x, y + 4);
        }
        if (!isMarked?.(i, j)) continue;
        pen.beginPath();
        pen.arc(...ring, isNumbered ? radius * 0.75 : radius, 0, 7);
        Object.assign(pen, { fillStyle: "#fff" }).fill();
        pen.stroke();
      }
      Object.assign(pen, { strokeStyle: theme.muted, lineWidth: 1 });
      pen.setLineDash([4, 3]);
      for (const [from, to] of panel.borders ?? []) pen.strokeRect(px(from), py(from), px(to) - px(from), py(to) - py(from));
      pen.setLineDash([]);
      if (panel.diagonal) pen.stroke(new Path2D(`M${px(whole.x[0])},${py(whole.y[0])}L${px(whole.x[1])},${py(whole.y[1])}`));
      for (const [colour, wide] of [[theme.paper, 4], [theme.accent, 2]]) {
        Object.assign(pen, { strokeStyle: colour, lineWidth: wide });
        const [i, j] = [down, across].map((name) => (axis(name).select && isThere(name) ? index(name) : -1));
        const around = (from, to) => (to - from < 6 ? [from - 3, to - from + 6] : [from, to - from]); // not over the cells
        const [y, h] = i < 0 ? [TOP, tall] : around(py(i), py(i + 1));
        const [x, w] = j < 0 ? [left, inner] : around(px(j), px(j + 1));
        if (i >= 0 || j >= 0) pen.strokeRect(x, y, w, h);
      }
      pen.restore();
      Object.assign(pen, { fillStyle: theme.muted, font: "11px system-ui, sans-serif", textAlign: "center" });
      const ticks = (name, [low, high], room) => {
        const step = 2 ** Math.max(0, Math.ceil(Math.log2((high - low) / room))); // as chunks are long
        const [first, end] = [Math.ceil(low / step), Math.ceil(Math.min(high, axis(name).size) / step)];
        return Array.from({ length: Math.max(end - first, 0) }, (_, k) => (first + k) * step);
      };
      for (const j of ticks(across, window.x, inner / 44)) pen.fillText(place(across, j), Math.min((px(j) + px(j + 1)) / 2, width - 14), TOP + tall + 13);
      pen.fillText(axis(across).title, left + inner / 2, TOP + tall + 26);
      pen.textAlign = "right";
      for (const i of ticks(down, window.y, tall / 13)) pen.fillText(named(down, i), left - 6, (py(i) + py(i + 1)) / 2 + 4);
      pen.translate(10, TOP + tall / 2);
      pen.rotate(-Math.PI / 2);
      Object.assign(pen, { textAlign: "center" }).fillText(axis(down).title, 0, 0);
      canvas.setAttribute("aria-label", `${panel.title}. ${tell([index(down), index(across)])}`);
    };
    return Object.assign(again, { lay: again });
  }

  // Asks Python for finer numbers of what is on screen: one question at a time, the newest wish last.
  function ask(linked) {
    const window = windows.get(linked);
    window.isLate = window.isAsked;
    if (window.isAsked) return;
    window.isAsked = true;
    model.send({ region: { panel: linked, x: window.x, y: window.y } });
  }
  function answer() {
    const { arrays: finer, notes, panel } = model.get("finer");
    for (const [name, array] of Object.entries(finer)) arrays[name] = new Values(array);
    for (const each of drawn) if (each.panel.name in notes) each.tell({ note: notes[each.panel.name] });
    redraw();
    const window = windows.get(panel);
    window.isAsked = false;
    if (window.isLate) ask(panel);
  }

  // A small map for each place of the first axis; a click chooses it.
  function addMultiples(figure, panel) {
    const [each, down, across] = panel.axes;
    const box = make("div", figure, { className: "l4-multiples" });
    const small = Array.from({ length: axis(each).size }, (_, i) => {
      const canvas = make("canvas", make("button", box, { onclick: () => choose([[each, i]]) }));
      make("span", canvas.parentNode, { textContent: called(each, i) });
      return canvas;
    });
    return () =>
      small.forEach((canvas, i) => {
        const picture = arrays[panel.array].paint([down, across], (name) => (name === each ? i : index(name)), panel.scale);
        Object.assign(canvas, { width: picture.width, height: picture.height });
        canvas.getContext("2d").drawImage(picture, 0, 0);
        canvas.parentNode.classList.toggle("l4-selected", i === index(each));
        canvas.parentNode.setAttribute("aria-pressed", i === index(each));
      });
  }

  function fillScale(box, scale) {
    box.replaceChildren();
    if (scale.kind === "category") {
      if (scale.colours.length > 16) return;
      make("span", box, { textContent: scale.unit });
      return scale.colours.forEach((colour, i) => make("i", box, { textContent: i, style: `background:${colour};color:${scale.inks[i]}` }));
    }
    make("span", box, { textContent: told(scale.low, { ...scale, unit: "" }) });
    make("i", box, { className: "l4-ramp", style: `background:linear-gradient(90deg,${stopsOf(scale).join()})` });
    make("span", box, { textContent: `${told(scale.high, scale)}${scale.label ? ` ${scale.label}` : ""}` });
  }

  // Begins a chart anew, with a rule and a number at each of some heights.
  function chart(svg, { wide }, tall, heights, y, label) {
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${wide} ${tall}`);
    const rule = (v, css) => draw("line", svg, { x1: LEFT, x2: wide - RIGHT, y1: y(v), y2: y(v), class: css });
    for (const v of heights) (rule(v, "l4-rule"), draw("text", svg, { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, label(v)));
    return rule;
  }

  function addBars(figure, panel) {
    const [name] = panel.axes;
    const { title, size, select } = axis(name);
    const svg = draw("svg", figure, { role: "img", height: 200, tabindex: select ? 0 : -1 });
    onKeys(svg, (right, down) => walk([name, right + down]));
    const spoken = (v) => (Number.isFinite(v) ? written(v, panel.scale.unit) : "no number");
    const shine = (i) => select === "expert" && drawn.forEach((each) => each.again.shine?.(i));
    return () => {
      const [heights, ghosts] = [panel.array, panel.clean].map((array) => array && Array.from({ length: size }, (_, i) => picked(array, seen)(panel.axes)(i)));
      const chosen = panel.chosen?.map((array) => picked(array, seen)([])()) ?? (select ? [index(name)] : []);
      const top = panel.scale.high ?? Math.max(...heights.filter(Number.isFinite), panel.reference ?? 0, 1e-9) * 1.1;
      const y = (v) => 166 - ((Number.isFinite(v) ? v : 0) / top) * 142;
      const rule = chart(svg, figure, 200, [0, 1, 2, 3, 4].map((quarter) => (quarter * top) / 4), y, spoken);
      if (panel.reference) rule(panel.reference, "l4-reference");
      const pitch = (figure.wide - LEFT - RIGHT) / size;
      heights.forEach((v, i) => {
        const bar = draw("g", svg, { class: chosen.includes(i) ? "l4-chosen" : "" });
        const [middle, wide] = [LEFT + pitch * (i + 0.5), pitch * 0.76];
        const box = { x: middle - wide / 2, width: wide };
        draw("rect", bar, { ...box, y: 0, height: 200, fill: "transparent" }); // easy to point at
        draw("rect", bar, { ...box, y: y(v), height: y(0) - y(v), fill: panel.colours?.[i] ?? "#6c9cfc", class: "l4-bar-box" });
        const clear = [ghosts?.[i], panel.reference].sort((a, b) => a - b).reduce((at, line) => (line > at && y(at) - y(line) < 16 ? line : at), v); // no line strikes the number out
        if (pitch >= 34) draw("text", bar, { x: middle, y: y(clear) - 5, "text-anchor": "middle" }, pitch < 56 ? written(v) : spoken(v));
        if (ghosts) draw("line", bar, { x1: box.x, x2: box.x + wide, y1: y(ghosts[i]), y2: y(ghosts[i]), class: "l4-ghost" });
        if (size <= 32 || i % 8 === 0) draw("text", bar, { x: middle, y: 181, "text-anchor": "middle" }, place(name, i));
        bar.onclick = () => (point(), shine(), choose([[name, i]])); // WebKit tells no leaving of what goes
        bar.onpointermove = (event) => point(event, `${title} ${place(name, i)}: ${spoken(v)}${ghosts ? `; clean ${spoken(ghosts[i])}` : ""}`);
        bar.onpointerenter = () => shine(i);
        bar.onpointerleave = () => (point(), shine());
      });
      draw("text", svg, { x: (LEFT + figure.wide) / 2, y: 197, "text-anchor": "middle" }, title);
      const said = heights.map((v, i) => `${title} ${place(name, i)}: ${spoken(v)}${ghosts ? ` (clean ${spoken(ghosts[i])})` : ""}`);
      svg.setAttribute("aria-label", `${panel.title}. ${select ? `Selected: ${said[index(name)]}. All: ` : ""}${said.join(", ")}`);
    };
  }

  function addLines(figure, panel) {
    const [name] = panel.axes;
    const svg = draw("svg", figure, { role: "img", height: 180, tabindex: axis(name).select ? 0 : -1 });
    const legend = make("div", figure, { className: "l4-scale" });
    for (const { colour, label, dash } of panel.series.filter((one) => one.label)) (make("i", legend, { className: "l4-line", style: `border-top: 2px ${dash ? "dashed" : "solid"} ${colour}` }), make("span", legend, { textContent: label }));
    onKeys(svg, (right, down) => walk([name, right + down]));
    return () => {
      const [width, count] = [figure.wide, axis(name).size];
      const series = panel.series.map((one) => ({ ...one, at: picked(one.array)(panel.axes) }));
      const all = series.flatMap(({ at }) => Array.from({ length: count }, (_, i) => at(i))).filter(Number.isFinite);
      const [low, high] = [panel.scale.low ?? Math.min(...all), panel.scale.high ?? Math.max(...all)];
      const x = (i) => LEFT + ((i + 0.5) / count) * (width - LEFT - RIGHT);
      const y = (v) => 150 - ((v - low) / (high - low || 1)) * 130;
      chart(svg, figure, 180, [low, (low + high) / 2, high], y, written);
      series.forEach(({ at, colour, dash }) => {
        const path = Array.from({ length: count }, (_, i) => (Number.isFinite(at(i)) ? `${x(i)},${y(at(i))}` : null)).filter(Boolean);
        if (path.length) draw("path", svg, { d: `M${path.join("L")}`, fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash ?? "" });
      });
      if (axis(name).select) draw("line", svg, { x1: x(index(name)), x2: x(index(name)), y1: 18, y2: 150, class: "l4-reference" });
      for (const i of width / count > 50 ? Array(count).keys() : [0, count >> 1, count - 1]) draw("text", svg, { x: Math.min(x(i), width - 2 - 3.3 * `${written(place(name, i))}`.length), y: 163, "text-anchor": "middle" }, written(place(name, i)));
      draw("text", svg, { x: width / 2, y: 177, "text-anchor": "middle" }, `${axis(name).title} (${panel.scale.unit} upwards)`);
      const said = (i) => `${called(name, i)}: ${series.map(({ at, label }) => label && `${label} ${written(at(i), panel.scale.unit)}`).filter(Boolean).join(", ")}`;
      svg.setAttribute("aria-label", `${panel.title}. ${(axis(name).select ? [index(name)] : [0, count - 1]).map(said).join("; ")}`);
      svg.onclick = (event) => {
        const frame = svg.getBoundingClientRect();
        choose([[name, clamp(Math.floor(((event.clientX - frame.left - LEFT) / (width - LEFT - RIGHT)) * count), 0, count - 1)]]);
      };
    };
  }

  // `positions` say, row by row of the picture's grid, which index of the axis shows each cell.
  function addPicture(figure, panel) {
    const [name] = panel.axes;
    const { rows, cols, positions, boxes = [] } = panel;
    const box = make("div", figure, { className: "l4-picture", tabIndex: 0 }, { role: "img" });
    box.style.aspectRatio = `${panel.width} / ${panel.height}`;
    make("img", box, { src: panel.source, alt: "" });
    const cells = positions.map((position) => hover(make("i", box, { onclick: () => choose([[name, position]]) }), () => describe(panel, [position])));
    box.style.setProperty("--grid", `repeat(${rows}, 1fr) / repeat(${cols}, 1fr)`);
    for (const [left, top, right, bottom, label, className = ""] of boxes) {
      const part = (value, whole) => `${(100 * value) / whole}%`;
      const style = `left:${part(left, panel.width)};top:${part(top, panel.height)};width:${part(right - left, panel.width)};height:${part(bottom - top, panel.height)}`;
      make("span", make("b", box, { style, className }), { textContent: label });
    }
    onKeys(box, (right, down) => {
      const at = Math.max(positions.indexOf(index(name)), 0) + right + down * cols;
      choose([[name, positions[clamp(at, 0, positions.length - 1)]]]);
    });
    return () => {
      const [value, colour] = [picked(panel.array)(panel.axes), colourOf(panel.scale)];
      cells.forEach((node, i) => {
        const v = value(positions[i]);
        node.style.background = v === v ? `rgb(${colour(v).join(" ")} / ${panel.opacity ?? 0.6})` : "none";
        node.classList.toggle("l4-selected", place(name, positions[i]) === group.selection[axis(name).select]);
      });
      box.setAttribute("aria-label", `${panel.title}. ${describe(panel, [index(name)])}`);
    };
  }

  const scrolled = (figure, { title }) => make("table", make("div", figure, { className: "l4-scroll", tabIndex: 0 }, { role: "group", "aria-label": title }));

  // A table of words, `text[row][column]`, around the selected column, coloured by an array.
  function addWords(figure, panel) {
    const [down, across] = panel.axes;
    const table = scrolled(figure, panel);
    onKeys(table.parentNode, (right, low) => walk([across, right], [down, low]));
    return () => {
      const room = Math.max(axis(across).size > 16 ? 3 : 16, Math.floor((figure.wide - 120) / (panel.cell ?? 84)));
      const first = clamp(index(across) - Math.floor(room / 2), 0, Math.max(axis(across).size - room, 0));
      const columns = Array.from({ length: Math.min(room, axis(across).size) }, (_, j) => first + j);
      const [value, colour] = [picked(panel.array)(panel.axes), colourOf(panel.scale)];
      table.replaceChildren();
      const top = make("tr", table);
      make("th", top, { textContent: axis(down).title });
      columns.forEach((j) => make("th", top, { textContent: `${place(across, j)} ${axis(across).labels?.[j] ?? ""}`, onclick: () => choose([[across, j]]) }));
      for (let i = 0; i < axis(down).size; i++) {
        const row = make("tr", table);
        make("th", row, { textContent: axis(down).labels?.[i] ?? place(down, i) });
        for (const j of columns) {
          const back = colour(value(i, j));
          const light = [0.2126, 0.7152, 0.0722].reduce((sum, share, k) => sum + share * (back[k] / 255) ** 2.2, 0);
          const cell = make("td", row, { textContent: panel.text[i][j], onclick: () => (point(), choose([[down, i], [across, j]])) });
          Object.assign(cell.style, { background: `rgb(${back.join(" ")})`, color: light < 0.18 ? "#fff" : "#000" });
          cell.classList.toggle("l4-selected", j === index(across) && (!axis(down).select || i === index(down)));
          hover(cell, () => `${panel.text[i][j]} – ${describe(panel, [i, j])}`);
        }
      }
    };
  }

  function addTable(figure, panel) {
    const table = scrolled(figure, panel);
    if (panel.choices) onKeys(table.parentNode, (right, down) => table.rows[clamp([...table.rows].findIndex((row) => row.className) + right + down, 1, panel.rows.length)]?.onclick?.());
    let filled; // what stands there
    function fill() {
      filled = panel.rows;
      table.replaceChildren();
      const top = make("tr", table);
      panel.columns.forEach((text) => make("th", top, { textContent: text }));
      panel.rows.forEach((cells, i) => {
        const row = make("tr", table);
        if (panel.choices?.[i]) row.onclick = () => select(panel.choices[i]);
        cells.forEach((cell, j) => {
          const node = make("td", row, { textContent: typeof cell === "number" ? written(cell) : (cell ?? "no number") });
          const bound = panel.bars?.[j]; // of a column whose numbers have bars beside them
          if (!bound || typeof cell !== "number") return;
          const [end, colour] = [50 + 50 * clamp(cell / bound, -1, 1), cell < 0 ? "rgb(33 102 172 / 0.5)" : "rgb(178 24 43 / 0.5)"];
          const [from, to] = [Math.min(end, 50), Math.max(end, 50)], bar = `linear-gradient(90deg, transparent ${from}%, ${colour} ${from}% ${to}%, transparent ${to}%)`;
          Object.assign(node.style, { minWidth: panel.columns.length > 2 ? "112px" : "150px", background: `${bar} right / calc(100% - 56px) 100% no-repeat` });
        });
      });
    }
    return () => {
      if (filled !== panel.rows) fill();
      panel.rows.forEach((_, i) => {
        const fits = Object.entries(panel.choices?.[i] ?? { none: 1 }).every(([field, v]) => group.selection[field] === v);
        if (table.rows[i + 1].classList.toggle("l4-selected", fits) && document.activeElement === table.parentNode) table.rows[i + 1].scrollIntoView({ block: "nearest" });
      });
    };
  }

  // -- putting it together

  const undress = () => ((theme = {}), redraw());
  const restyle = new MutationObserver(undress); // whoever changes a page's theme changes an attribute
  for (const node of [document.documentElement, document.body]) restyle.observe(node, { attributes: true });
  for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)"]) matchMedia(query).addEventListener("change", undress, { signal });

  function redraw(which = drawn) {
    if (!theme.paper) {
      const style = getComputedStyle(root);
      theme = Object.fromEntries(["muted", "paper", "ground", "accent"].map((name) => [name, style.getPropertyValue(`--${name}`)]));
      isDark = style.color.match(/\d+/g)?.[1] > 128; // its words are bright
      for (const each of drawn) each.tell({});
    }
    which.forEach(show);
    say();
    const ours = root.closest(".l4-view"); // ipywidgets leaves unsaid what its controls are set to
    const tell = (node, name, text) => node && node[name] !== text && (node[name] = text);
    for (const each of ours?.querySelectorAll(".widget-slider") ?? [])
      for (const [name, part] of [["ariaLabel", "label"], ["ariaValueText", ".widget-readout"]]) tell(each.querySelector("[role=slider]"), name, each.querySelector(part)?.textContent);
    for (const box of [ours, ours?.closest(".l4-app")?.querySelector(":scope > .l4-app-chips")])
      for (const each of box?.querySelectorAll(".widget-toggle-button") ?? []) tell(each, "ariaPressed", String(each.classList.contains("mod-active"))) && restyle.observe(each, { attributeFilter: ["class"] });
  }
  // A browser that is asked for a size after a change lays the whole page out for the answer; here it
  // tells sizes when it knows them, before it paints.
  const watch = new ResizeObserver((entries) => {
    const found = entries.filter(({ target, contentRect }) => target.wide !== (target.wide = Math.floor(contentRect.width))).map(({ target }) => target);
    if (found.length) redraw(drawn.filter(({ figure }) => found.includes(figure)));
  });

  function rebuild() {
    content = model.get("content");
    arrays = Object.fromEntries(Object.entries(content.arrays).map(([name, array]) => [name, new Values(array)]));
    const before = new Map(drawn.map((each) => [each.panel.name, each]));
    drawn = content.panels.map((panel) => {
      const key = JSON.stringify([panel, panel.axes?.map(axis)], (name, value) => (SAID.includes(name) ? undefined : value));
      const known = before.get(panel.name);
      const each = known?.key === key ? known : added(panel, key);
      each.tell(Object.fromEntries(SAID.map((name) => [name, panel[name]])));
      return each;
    });
    const figures = drawn.map((each) => each.figure);
    const held = [...body.children].find((figure) => figure.contains(document.activeElement));
    // Whoever has the focus or has scrolled stays where they are; what replaces another gets its focus.
    for (const figure of [...body.children]) if (!figures.includes(figure)) (watch.unobserve(figure), figure.remove());
    figures.forEach((figure, i) => figure === body.children[i] || body.insertBefore(figure, body.children[i]));
    turn();
    redraw();
    if (held && !held.isConnected) body.querySelector(`[data-panel="${held.dataset.panel}"] [tabindex="0"]`)?.focus({ preventScroll: true });
  }
  // Takes the parts of arrays that came, and says how many are new.
  function turn() {
    const parts = Object.entries(model.get("pages") ?? {}).filter(([name, { page }]) => arrays[name]?.pages?.has(page) === false);
    for (const [name, part] of parts) arrays[name].take(part);
    return parts.length;
  }
  function added(panel, key) {
    const figure = make("figure", body, { className: `l4-${panel.wide === false ? "narrow" : "wide"}${panel.square ? " l4-square" : ""} l4-of-${panel.kind}`, style: panel.share ? `flex: 0 1 calc(${100 * panel.share}% - 20px)` : "" }, { "data-panel": panel.name });
    const caption = make("figcaption", figure);
    const [title, note] = [make("b", caption), make("span", caption)];
    const again = kinds[panel.kind](figure, panel);
    const isFaded = panel.kind === "strip" && panel.scale.kind === "sequential"; // by how opaque its colour is
    const legend = (isFaded || ["map", "picture", "words"].includes(panel.kind)) && make("div", figure, { className: "l4-scale" });
    const hint = () => panel.zoom && panel.name === content.panels.find((each) => each.zoom).name ? "(wheel, two fingers, + or −: zoom; drag, Shift+arrows: move; 0: all)" : "";
    let scaled;
    const tell = (change) => {
      Object.assign(panel, change);
      write(title, panel.title);
      figure.querySelector("[role=group]")?.setAttribute("aria-label", panel.title);
      write(note, [panel.note, hint()].map((text) => text && ` ${text}`).join(""));
      if (legend && scaled !== (scaled = JSON.stringify([panel.scale, isDark]))) fillScale(legend, isFaded ? { ...panel.scale, colours: ["#e08b0000", "#e08b00b2"] } : panel.scale);
    };
    watch.observe(figure);
    return { panel, key, figure, tell, again };
  }
  function retitle() {
    for (const [node, trait] of [[title, "title"], [explanation, "help"], [problem, "problem"]]) write(node, model.get(trait));
    say();
    root.classList.toggle("l4-busy", Boolean(model.get("busy")));
    root.dataset.busy = model.get("busy");
  }
  function listen() {
    const theirs = model.get("selection");
    if ((theirs.seq ?? 0) <= (group.selection.seq ?? 0)) return; // older than what people chose here
    group.selection = theirs;
    for (const again of group.boards) again();
  }
  const reactions = [["content", rebuild], ["pages", () => turn() && redraw()], ["finer", answer], ["selection", listen], ["title help summary problem busy", retitle]];
  for (const [traits, react] of reactions) for (const trait of traits.split(" ")) model.on(`change:${trait}`, react);
  for (const react of [rebuild, retitle, listen]) react();
  watch.observe(body);
  return () => {
    for (const each of [watch, restyle]) each.disconnect();
    group.boards.delete(redraw);
  };
}

export default { render };
