// The view of a Prompt, after elements.js: a field for a text, and a button that runs it.

function render({ model, el }) {
  const form = make("form", el, { className: "l4-prompt" });
  const [act, label] = [model.get("act"), model.get("label")];
  const hint = `Enter: ${act}; Shift+Enter: a new line`;
  const field = make("textarea", form, { rows: 1, spellcheck: false, title: hint, placeholder: label }, { "aria-label": label });
  const button = make("button", form, { textContent: act, title: `${act} (Enter)` });
  const fit = () => {
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight + 2, 150)}px`;
  };
  const show = () => ((field.value = model.get("value")), fit());
  field.oninput = fit;
  field.onkeydown = (event) => {
    event.stopPropagation(); // JupyterLab would refuse the line break of Shift+Enter
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  };
  button.onclick = (event) => void (model.get("is_busy") && event.preventDefault()); // disabled, it would lose the focus
  form.onsubmit = (event) => {
    event.preventDefault();
    if (field.value === model.get("value")) model.send({ again: true }); // which changes no trait
    model.set("value", field.value);
    model.save_changes();
  };
  model.on("change:value", show);
  model.on("change:is_busy", () => button.setAttribute("aria-disabled", model.get("is_busy")));
  show();
  const watch = new ResizeObserver(fit); // a field that is not in the page yet has no height
  watch.observe(form);
  return () => watch.disconnect();
}

export default { render };
