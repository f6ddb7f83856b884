"""What a model needs on a GPU, how fast it can be at best, and why."""

from typing import Any

import ipywidgets
import numpy as np

from llama4_lab.config import BEHEMOTH_ESTIMATE, MAVERICK, SCOUT, Llama4Config
from llama4_lab.hardware import GPUS
from llama4_lab.plan import CACHE_BYTES, PRECISIONS, USABLE, Plan
from llama4_lab.plan_page import longest, reason
from llama4_widgets.panels import Axis, Content, above_zero
from llama4_widgets.view import View, in_row
from llama4_widgets.words import counted

_CONTEXTS = [2**i for i in range(9, 21)]  # 512 to a million tokens
_BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


class PlannerView(View):
    """Model, precision, GPU and context: does it fit, how fast can it be, what holds it back."""

    title = "Planner"
    help = (
        "Decoding reads every weight that a token needs, so bandwidth bounds it; a long prompt is "
        "bound by products. Good programs reach half of these rooflines. A step is taken at the "
        "end of a chunk, where RoPE layers read the most: none is faster there, elsewhere a step "
        "has less to read."
    )

    def controls(self) -> list[ipywidgets.Widget]:
        names = ["this model", "Scout", "Maverick", "Behemoth (an estimate)"]
        self.choices: dict[str, Any] = {
            "model": ipywidgets.Dropdown(options=names, value="Scout"),
            "weights": ipywidgets.Dropdown(options=list(PRECISIONS), value="int4"),
            "cache": ipywidgets.Dropdown(options=list(CACHE_BYTES), value="bf16"),
            "GPU": ipywidgets.Dropdown(options=[(gpu.name, key) for key, gpu in GPUS.items()]),
            "GPUs": ipywidgets.Dropdown(options=[1, 2, 4, 8], value=1),
            "batch": ipywidgets.Dropdown(options=_BATCHES, value=1),
            "context": ipywidgets.SelectionSlider(
                options=[(f"{n:,}", n) for n in _CONTEXTS], value=8192
            ),
        }
        self.choices["GPU"].value = "h100"
        for name, widget in self.choices.items():
            widget.description = name
            widget.style.description_width = "56px"
            widget.layout.width = {"context": "330px", "model": "250px"}.get(name, "210px")
            widget.observe(lambda _: self.refresh(), "value")
        return [in_row(*self.choices.values())]

    def config(self) -> Llama4Config:
        """Return the sizes of the chosen model."""
        known = {"Scout": SCOUT, "Maverick": MAVERICK, "this model": self.moment.model.config}
        return known.get(self.choices["model"].value, BEHEMOTH_ESTIMATE)

    def contexts(self) -> list[int]:
        """Return the contexts of the chosen model, none longer than it is made for."""
        most = self.config().max_position_embeddings
        return [n for n in _CONTEXTS if n <= most] or [most]

    def _offer(self, contexts: list[int]) -> None:
        """Offer these contexts, and keep what is chosen as far as they go."""
        slider, options = self.choices["context"], tuple((f"{n:,}", n) for n in contexts)
        if slider.options == options:
            return
        chosen = min(slider.value, contexts[-1])
        self._is_held = True  # this is drawn already
        try:
            slider.options = options
            slider.value = chosen
        finally:
            self._is_held = False

    def plan(self) -> Plan:
        """Return the plan that the controls describe.

        Raises:
            ValueError: GPUs that cannot share the model's heads.
        """
        chosen = {name: widget.value for name, widget in self.choices.items()}
        gpu = GPUS[chosen["GPU"]]
        return Plan(self.config(), gpu, chosen["GPUs"], chosen["weights"], chosen["cache"])

    def content(self) -> Content:
        contexts = self.contexts()
        self._offer(contexts)
        plan, batch = self.plan(), self.choices["batch"].value
        context = self.choices["context"].value
        content = Content({"context": Axis("context in tokens", len(contexts), values=contexts)})
        needed = plan.needed(batch, context)
        needed |= {"together": sum(needed.values()), "a GPU holds": plan.usable}
        rows = [[part, size / 1e9] for part, size in needed.items()]
        driver = plan.gpu.memory
        steps = [
            (f"decode {counted(batch, 'row')}", plan.decode(batch, context)),
            (f"prefill {context:,} tokens", plan.prefill(context)),
        ]
        times = {"read": "read_seconds", "products": "math_seconds"}
        if any(roof.exchange_seconds for _, roof in steps):
            times["exchange"] = "exchange_seconds"
        speeds = [
            [what, roof.tokens_per_second]
            + [round(1e3 * getattr(roof, seconds), 3) for seconds in times.values()]
            for what, roof in steps
        ]
        columns = ["what", "tokens/s", *(f"{name} (ms)" for name in times)]
        content.table("speed", "Speed at best", columns, speeds)
        content.table(
            "memory", "Memory of each GPU", ["part", "GB"], rows, wide=False,
            note=f"GB: 10⁹ bytes; its driver reports {driver / 2**30:.1f} GiB, which are "
            f"{driver / 1e9:.1f} GB, and {USABLE:.0%} of them can be filled",
        )  # fmt: skip
        speed = [
            plan.decode(batch, n).tokens_per_second if plan.fits(batch, n) else np.nan
            for n in contexts
        ]
        series = [{"array": "decode", "label": "decode", "colour": "#6c9cfc"}]
        content.add(
            "decode",
            "Decoding, by context",
            np.array(speed),
            ("context",),
            above_zero(np.nan_to_num(speed), "tokens/s", 1),
            kind="lines",
            wide=False,
            series=series,
            doubles=True,
            note="where it fits in memory; each step doubles the context"
            if np.isfinite(speed).any()
            else "it fits at no context",
        )
        return content

    def summary(self) -> str:
        plan, batch = self.plan(), self.choices["batch"].value
        context, config = self.choices["context"].value, self.config()
        step = plan.decode(batch, context)
        fits = "it fits" if plan.fits(batch, context) else "it does not fit"
        said = f"AN ESTIMATE, never released: {fits}" if config.is_estimate else f"I{fits[1:]}"
        return (
            f"{said}; {longest(plan, batch)}. Decoding {counted(batch, 'row')}: at best "
            f"{step.tokens_per_second:,.0f} tokens/s, {reason(step, plan)}."
        )
