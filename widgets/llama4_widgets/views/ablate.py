"""Switches and sliders that change the model, and what each change does to its answer."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ipywidgets
import numpy as np
import traitlets

from llama4_lab import edits as E
from llama4_lab.config import Llama4Config
from llama4_lab.edits import Edit
from llama4_widgets.moment import ROUNDING
from llama4_widgets.panels import Axis, Content, above_zero, around_zero
from llama4_widgets.view import EditingView, button, in_row
from llama4_widgets.views.router import add_flips
from llama4_widgets.words import NO_NUMBERS

_STRENGTH = [round(0.1 * i, 1) for i in range(31)]
_WARMTH = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0]
_SCALES = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0]
_MULTIPLY = ("factor", "temperature")  # what several edits of one place do together
_DRAG = 1.0  # seconds between two steps of a slider that are taken back as one, at most

Fits = Callable[[Llama4Config, int], bool]


_is_moe, _uses_rope = Llama4Config.is_moe, Llama4Config.uses_rope


def _always(_config: Llama4Config, _layer: int) -> bool:
    return True


def _is_chunked(config: Llama4Config, layer: int) -> bool:
    return config.attention_chunk(layer) is not None


def _is_tempered(config: Llama4Config, layer: int) -> bool:
    return not config.uses_rope(layer) and config.attn_temperature_tuning


def _not(fits: Fits) -> Fits:
    return lambda config, layer: not fits(config, layer)


@dataclass
class Control:
    """A switch, or a slider over `values`, that stands for one edit of the selected layer."""

    text: str
    tip: str
    make: Callable[..., Edit]  # of the layer, and a slider's value
    fits: Fits = _always
    values: Iterable[float] = ()
    usual: Any = False  # where there is no edit
    field: str | None = None  # of the edit, that the value is; None for a switch
    shared: Mapping[str, Any] | None = None  # style and layout: a page takes its time for each

    def __post_init__(self) -> None:
        if self.field is None:
            make, options = ipywidgets.ToggleButton, dict(self.shared or {})
        else:
            make, options = ipywidgets.SelectionSlider, {"options": _steps(self.values)}
            options |= {"style": {"description_width": "128px"}, "layout": {"width": "290px"}}
        said = {"description": self.text, "tooltip": self.tip}
        self.widget: Any = make(value=self.usual, **said, **options)

    def edit(self, layer: int, value: Any) -> Edit:
        """Return the edit that a value stands for."""
        return self.make(layer) if self.field is None else self.make(layer, value)

    def is_one(self, edit: Edit, layer: int) -> bool:
        """Whether an edit is what this control makes, with any value."""
        mine = self.edit(layer, self.usual)
        if self.field is None:
            return edit == mine
        at = ("layer", "point", "tokens")
        return type(edit) is type(mine) and all(
            getattr(edit, name, None) == getattr(mine, name, None) for name in at
        )

    def _holding(self, layer: int, edits: Sequence[Edit]) -> Edit | None:
        """Return the edit of this control that holds: of several, the last."""
        mine = self.edit(layer, self.usual)
        if isinstance(mine, E.Rope | E.Chunk):  # which excludes others of its kind
            alike = [edit for edit in edits if isinstance(edit, type(mine)) and edit.layer == layer]
            edits = alike[-1:]
        return next((edit for edit in reversed(edits) if self.is_one(edit, layer)), None)

    def show(self, config: Llama4Config, layer: int, edits: Sequence[Edit]) -> None:
        """Show the value that a layer has; hide what it cannot have."""
        fits = self.fits(config, layer)
        if self.shared is None:  # else the row is shown and hidden as a whole
            self.widget.layout.display = "" if fits else "none"
        if not fits:
            return
        found = self._holding(layer, edits)
        if self.field is None:
            self.widget.value = found is not None
        else:
            value = getattr(found, self.field, None)  # None: as in the model
            value = self.usual if value is None else value
            if self.field in _MULTIPLY:
                mine = (edit for edit in edits if self.is_one(edit, layer))
                value = math.prod(getattr(edit, self.field) for edit in mine)
            known = {option for _, option in self.widget.options}
            if value not in known:
                self.widget.options = _steps({*known, value})
            self.widget.value = value


def _steps(values: Iterable[float]) -> list[tuple[str, float]]:
    return [(f"{value:g}", value) for value in sorted(values)]


def _switches(config: Llama4Config) -> Iterator[Control]:
    chunk = config.attention_chunk_size or 128
    yield Control("skip layer", "leave the layer out", E.SkipLayer)
    yield Control("no attention", "attention adds nothing", E.AblateAttention)
    yield Control("no MLP", "the MLP adds nothing", E.AblateMLP, _not(_is_moe))
    yield Control("no shared expert", "it adds nothing", E.AblateShared, _is_moe)
    yield Control("NoPE", "turn rotary positions off", lambda i: E.Rope(i, False), _uses_rope)
    yield Control("RoPE", "turn rotary positions on", lambda i: E.Rope(i, True), _not(_uses_rope))
    yield Control("no chunks", "attend to the whole past", lambda i: E.Chunk(i, None), _is_chunked)
    text, tip = f"chunks of {chunk}", "attend inside chunks only"
    yield Control(text, tip, lambda i: E.Chunk(i, chunk), _not(_is_chunked))


def _sliders(config: Llama4Config) -> Iterator[Control]:
    tip = "multiplies what this adds to the residual stream; 0: nothing"
    for text, part, fits in (
        ("attention ×", "attn.out", _always),
        ("routed experts ×", "experts.out", _is_moe),
        ("shared expert ×", "shared.out", _is_moe),
        ("MLP ×", "mlp.out", _not(_is_moe)),
    ):
        yield Control(text, tip, partial(_scale, part), fits, _STRENGTH, 1.0, "factor")
    text, make = "router temperature", E.RouterTemperature
    tip = "divides the router's logits: above 1, scores come closer to a half"
    yield Control(text, tip, make, _is_moe, _WARMTH, 1.0, "temperature")
    counts, topk = range(1, config.num_local_experts + 1), config.num_experts_per_tok
    yield Control(
        "top-k", "how many experts each token chooses", E.TopK, _is_moe, counts, topk, "k"
    )
    text, make, own = "temperature tuning", E.AttentionTemperature, config.attn_scale
    tip = "how much sharper queries become late in the text; 0: not at all"
    yield Control(text, tip, make, _is_tempered, {*_SCALES, own}, own, "scale")


def _scale(part: str, layer: int, factor: float) -> Edit:
    return E.Scale(f"layers.{layer}.{part}", factor)


class AblateView(EditingView):
    """Edits of the selected layer as switches and sliders, beside what they did.

    `edits` is the truth: controls and text set it, and show it.
    """

    title = "Ablate"
    help = (
        "Every switch changes the running model, and the colours say how far each token's "
        "prediction moved from the clean one (KL divergence). What a part is for shows in what "
        "breaks without it."
    )
    follows = ("layer", "token")

    # ---- controls

    def controls(self) -> list[ipywidgets.Widget]:
        self._history: list[tuple[Edit, ...]] = []
        self._step: Any = None  # the slider that moved last, its layer, and the edits it left
        self._stepped = 0.0  # when
        self._is_showing = False
        self._written: tuple[Edit, ...] | None = None  # the edits in the text field
        self._controls: list[Control] = []
        self._made_for: Llama4Config | None = None
        self._layer = ipywidgets.HTML()
        self._rows = ipywidgets.VBox()
        self._hide = ipywidgets.ToggleButton(description="hide token")
        self._hide.observe(self._hide_token, "value")
        self._text = ipywidgets.Textarea(
            description="JSON",
            style={"description_width": "initial"},
            layout={"width": "100%", "height": "48px"},
        )
        self._code = ipywidgets.HTML()
        undo = button("Undo", "take back the last change", self.undo)
        clear = button("Clear", "go back to the clean model", lambda: self._set(()))
        apply = button("Apply text", "use the edits in the text field", self.apply_text)
        # No Accordion, whose heads the keyboard does not reach.
        details = ipywidgets.VBox([self._text, in_row(apply), self._code])
        more = ipywidgets.ToggleButton(description="Edits as text and code")
        unfold = {True: "", False: "none"}.get
        traitlets.dlink((more, "value"), (details.layout, "display"), unfold)
        top = ipywidgets.HBox([self._layer, undo, clear])
        top.add_class("l4-app-chips")
        return [top, self._rows, in_row(more), details]

    def undo(self) -> None:
        """Take back the last change, if this prompt can have what was before it."""
        *earlier, last = self._history or [self.edits]
        if self._set(last):
            self._history = earlier

    def apply_text(self) -> None:
        """Use the edits that stand in the text field, as JSON."""
        try:
            self._set(E.loads(self._text.value))
        except (ValueError, TypeError) as error:
            self.board.problem = str(error)

    def _set(self, edits: Sequence[Edit]) -> bool:
        """Use edits, or say what is wrong with them and keep those that are."""
        try:
            if tuple(edits) == self.edits and self.board.problem:
                self.refresh()  # what is said there is of a wish before
            self.edits = tuple(edits)
        except (ValueError, traitlets.TraitError) as error:
            self.board.problem = str(error)
            self._show_controls()
            return False
        return True

    def _build(self, config: Llama4Config) -> None:
        """Make the controls that a model can have, once: a slider under the mouse must stay."""
        switches, sliders = list(_switches(config)), list(_sliders(config))
        shared = {"style": switches[0].widget.style, "layout": ipywidgets.Layout()}
        heads = [
            Control(f"{j}", f"head {j} adds nothing", partial(E.AblateHead, head=j), shared=shared)
            for j in range(config.num_attention_heads)
        ]
        tip = "drop expert {}: its tokens go to their next best"
        dropped = [
            Control(f"{j}", tip.format(j), partial(E.DropExpert, expert=j), _is_moe, shared=shared)
            for j in range(config.num_local_experts)
        ]
        self._controls = [*switches, *sliders, *heads, *dropped]
        for control in self._controls:
            control.widget.observe(lambda change, c=control: self._use(c, change["new"]), "value")
        self._dropped = _row("experts dropped", dropped)
        self._rows.children = [
            _row("", switches, [self._hide]),
            _row("", sliders),
            _row("heads off", heads),
            self._dropped,
        ]
        self._made_for = config

    def _use(self, control: Control, value: Any) -> None:
        if self._is_showing:
            return
        layer = self.selection.layer
        kept = [edit for edit in self.edits if not control.is_one(edit, layer)]
        new = [] if value == control.usual else [control.edit(layer, value)]
        count, step = len(self._history), (control.widget, layer)
        is_drag = self._step == (*step, self.edits) and time.monotonic() - self._stepped < _DRAG
        self._set([*kept, *new])
        if is_drag:
            del self._history[count:]  # one drag is taken back as one
        self._step = (*step, self.edits) if control.field else None
        self._stepped = time.monotonic()

    def _hide_token(self, change: Any) -> None:
        if not self._is_showing:
            edit = E.RemoveTokens((self.selection.token,))
            kept = [each for each in self.edits if each != edit]
            self._set([*kept, edit] if change["new"] else kept)

    def _show_controls(self) -> None:
        """Show what the edits are, for the selected layer and token."""
        config, layer, token = self.moment.model.config, self.selection.layer, self.selection.token
        self._is_showing = True
        try:
            if self._made_for != config:
                self._build(config)
            kind = "RoPE" if config.uses_rope(layer) else "NoPE"
            feed = "experts" if config.is_moe(layer) else "dense MLP"
            self._layer.value = f"<b>Layer {layer}</b> ({kind}, {feed}); choose others in any view"
            for control in self._controls:
                control.show(config, layer, self.edits)
            self._dropped.layout.display = "" if config.is_moe(layer) else "none"
            self._hide.description = f"hide token {token}"
            self._hide.tooltip = f"hide ‘{self.moment.words[token]}’ from all later tokens"
            self._hide.value = E.RemoveTokens((token,)) in self.edits
            if self._written != self.edits:  # else what is being typed there stays
                self._written = self.edits
                self._text.value = E.dumps(self.edits)
                code = ", ".join(f"l4.edits.{edit!r}" for edit in self.edits)
                sources = ", {'clean': prompt}" * any(edit.reads(config) for edit in self.edits)
                self._code.value = (
                    "<pre style='white-space: pre-wrap'>"
                    f"with l4.edits.edited(model, [{code}]{sources}):\n    model(**prompt)</pre>"
                )
        finally:
            self._is_showing = False

    # ---- what is shown

    @traitlets.observe("edits")
    def _apply_edits(self, change: Any) -> None:
        before = change["old"]  # nothing at all, the first time
        self._history.append(before if isinstance(before, tuple) else ())
        super()._apply_edits(change)

    def content(self) -> Content:
        self.take_edits()
        self._show_controls()
        run, count = self.moment.edited_run, len(self.moment.words)
        kl, loss = np.zeros(count), np.zeros(count)
        loss[-1:] = np.nan  # nothing follows
        kl[run.first :] = run.effect.kl.cpu().numpy()
        loss[run.first :] = run.effect.loss_change.cpu().numpy()
        for values in (kl, loss):
            values[abs(values) < ROUNDING] = 0
        content = Content(self.axes() | {"prompt": Axis("", 1, labels=["loss"])})
        content.add(
            "kl",
            "How far each prediction moved",
            kl,
            ("token",),
            above_zero(kl, "nats"),
            kind="strip",
            note=f"KL from the clean prediction; strongest: {kl.max():.3g} nats",
        )
        content.add(
            "loss",
            "Change of the loss on the next token",
            loss[None],
            ("prompt", "token"),
            around_zero(loss, "nats"),
            note="red: worse than clean",
        )
        if run.effect.flips:
            add_flips(content, [*run.effect.flips.values()], "tokens whose experts changed")
        token = self.selection.token
        title = f"What follows {self.moment.called(token)}"
        columns = ["next token", "clean (%)", "edited (%)"]
        content.table("answers", title, columns, self._answers(token), wide=False)
        return content

    def fixed(self, content: Content) -> Collection[str]:
        return ("token",)  # the controls, which follow the layer, are no part of it

    def _answers(self, token: int) -> list[list[Any]]:
        run = self.moment.edited_run
        clean = self.moment.replay.logits[token].softmax(-1)
        own = slice(token - run.first, token - run.first + 1)
        edited = run.logits_of(own)[0].softmax(-1) if token >= run.first else clean
        return self.moment.likeliest(clean, edited, by=1)

    def summary(self) -> str:
        if not self.moment.edits:
            return "No edits: this is the model as it is."
        effect, count = self.moment.edited_run.effect, len(self.moment.words)
        config, edits = self.moment.model.config, self.moment.edits
        is_beyond = all(edit.first_token(config) >= count for edit in edits)
        if is_beyond and all(isinstance(edit, E.Chunk) for edit in edits):
            return "These edits change nothing in this prompt: it is no longer than a chunk."
        if effect.kl.isnan().any():
            return f"{NO_NUMBERS.capitalize()}: no predictions are left to compare."
        is_same = effect.kl.max() < ROUNDING and not any(effect.flips.values())
        if is_same and not effect.unseen:
            return "These edits change nothing in this prompt."
        return str(effect).replace("-", "−")


def _row(text: str, controls: Sequence[Control], more: Sequence[Any] = ()) -> ipywidgets.Box:
    label = [ipywidgets.Label(text, layout={"width": "110px"})] if text else []
    return in_row(*label, *(control.widget for control in controls), *more)
