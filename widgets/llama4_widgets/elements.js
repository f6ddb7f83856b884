// What every view is made of: HTML and SVG elements. Views follow in the same module.

const SVG = "http://www.w3.org/2000/svg";
const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" }; // on what has the focus, or Lab takes its keys

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
