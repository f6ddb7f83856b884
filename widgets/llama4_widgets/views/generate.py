"""Writing, token by token: how sure the model is, which experts work, what the cache holds."""

import asyncio
from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
import torch
import traitlets

from llama4_lab.cache import KVCache
from llama4_lab.generate import sample
from llama4_lab.trace import trace
from llama4_widgets.moment import Moment
from llama4_widgets.panels import Axis, Content, above_zero, experts
from llama4_widgets.slices import running_loop, watched
from llama4_widgets.view import View, button, in_row
from llama4_widgets.words import NO_NUMBERS, counted

_MOST = 256  # tokens of one branch
_TOP_P = 0.95  # of what is drawn
_TOLD = 120  # characters of one that was left, from its end


@dataclass(frozen=True)
class Written:
    """One new token, as it was chosen."""

    id: int
    probability: float
    entropy: float  # bits, of the whole distribution
    experts: tuple[int, ...]  # that read the token before it, by MoE layer; -1 is unknown


class GenerateView(View):
    """Continues the prompt, with the edits; stop it, go back to a token and branch.

    `written` are the tokens of the branch on screen, `branches` the ones that were left.
    """

    title = "Generate"
    help = (
        "A model writes one token after the other, each drawn from a distribution; its entropy "
        "says how open the choice was. Drawn is with the temperature, among the likeliest tokens "
        f"that hold {_TOP_P:.0%}. RoPE layers keep the keys and values of one chunk, NoPE layers "
        "those of everything."
    )
    kept = traitlets.Tuple(help="the new tokens that are to be looked at in all views")

    def controls(self) -> list[ipywidgets.Widget]:
        self.written: list[Written] = []
        self.branches: list[str] = []
        self._cache: KVCache | None = None
        self._play = ipywidgets.ToggleButton(
            description="Play", tooltip="write until it is pressed again"
        )
        self._play.observe(lambda change: change["new"] and self._begin(), "value")
        room = {"style": {"description_width": "84px"}, "layout": {"width": "260px"}}
        self._temperature = ipywidgets.FloatSlider(
            value=0.6,
            min=0.0,
            max=2.0,
            step=0.1,
            description="temperature",
            **room,
        )
        self._at = ipywidgets.IntSlider(description="branch at", **room)
        buttons = [
            button("Step", "write one token", self._write),
            button(
                "Branch",
                "forget what follows, and go on otherwise",
                lambda: self.branch(self._at.value),
            ),
            button("Start over", "go back to the prompt", self.restart),
            button("Look at it", "show prompt and new text in all views", self.keep),
        ]
        return [in_row(self._play, *buttons, self._temperature, self._at)]

    # ---- writing

    @traitlets.observe("moment")
    def _new_prompt(self, _change: Any) -> None:
        self.restart()

    def restart(self) -> None:
        """Go back to the prompt."""
        self._play.value = False
        self.written, self.branches, self._cache = [], [], None
        self._draws = torch.Generator(device=self.moment.model.device).manual_seed(0)
        self.refresh()

    def step(self) -> None:
        """Write one token."""
        with self.moment.computing():  # alone: else another prompt could come meanwhile
            self._step(self.moment)

    @torch.no_grad()
    def _step(self, moment: Moment) -> None:
        model, layers = moment.model, moment.model.config.routed_layers
        cache, self._cache = self._cache, None  # unless it has read all that it is given
        written, pixels = [one.id for one in self.written], None
        if cache is None:
            prompt = moment.prompt.to(model.device)
            ids, pixels = prompt.input_ids, prompt.pixel_values
            ids = torch.cat([ids, torch.tensor([written]).to(ids)], dim=1)
        else:
            ids = torch.tensor([written[-1:]], device=model.device)
        names = [f"layers.{i}.router.indices" for i in layers]
        with moment.running_edited(), trace(model, names) as seen:
            if cache is None:
                cache = model.new_cache()  # with the edits' chunks
            logits = model(ids, pixels, cache=cache, keep_last=1)[0, -1]
        if not logits.isfinite().all():
            raise ValueError(f"{NO_NUMBERS}: there is no next token")
        logprob = logits.float().log_softmax(-1)
        self.following = logprob.exp()
        token = int(sample(logits[None], self._temperature.value, _TOP_P, self._draws))
        bits = float(-(self.following * logprob).nan_to_num(0.0).sum() / np.log(2))
        read = tuple(int(seen[name][0, -1, 0]) for name in names)
        self.written.append(Written(token, float(self.following[token]), bits, read))
        self._cache = cache

    def branch(self, at: int) -> None:
        """Forget the new tokens from number `at` on, and go on from there otherwise."""
        if not 0 <= at <= len(self.written):
            raise ValueError(
                f"there is no new token {at} to branch at: {len(self.written)} were written"
            )
        self.branches += [self.text()] if self.written else []
        self.written, self._cache = self.written[:at], None
        self._write()

    def text(self) -> str:
        """Return what was written."""
        tokenizer, ids = self.moment.model.tokenizer, self._ids()
        return tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))

    def _ids(self) -> list[int]:
        stops = self.moment.model.config.stop_token_ids
        return [one.id for one in self.written if one.id not in stops]

    def _has_ended(self) -> bool:
        stops = self.moment.model.config.stop_token_ids
        return bool(self.written) and self.written[-1].id in stops

    def keep(self) -> None:
        """Ask for prompt and new text in all views."""
        self.kept = ()  # so that the same once more is news
        self.kept = tuple(self._ids())

    def _begin(self) -> None:
        if loop := running_loop():
            self._task = loop.create_task(self._write_on())
        else:  # outside of a notebook nobody could press pause
            while self._play.value:
                self._write_one()

    async def _write_on(self) -> None:
        with watched(self.board) as look:
            while self._play.value:
                self._write_one()
                await asyncio.sleep(0.01)  # lets the kernel hear what was pressed meanwhile
                look()
        self._play.value = False

    def _write(self) -> None:
        """Write one token and show it, or what went wrong."""
        if not self._has_ended():
            with self.working():
                self.step()
                self.refresh()

    def _write_one(self) -> None:
        self._write()
        if self._has_ended() or len(self.written) >= _MOST or self.board.problem:
            self._play.value = False

    # ---- what is shown

    def content(self) -> Content:
        words = [self.moment.word(one.id) for one in self.written]
        self._at.max = len(words)
        content = Content(self.axes())
        if not words:
            return content
        content.axes["new"] = Axis("new token", len(words), labels=words)
        entropy = np.array([one.entropy for one in self.written])
        content.add(
            "entropy", "What it wrote, bright where the choice was open", entropy, ("new",),
            above_zero(entropy, "bits", 1), kind="strip",
        )  # fmt: skip
        if layers := content.axes["moe layer"].size:
            chosen = np.array([one.experts for one in self.written]).T.reshape(layers, -1)
            content.add(
                "experts", "Experts at work", chosen, ("moe layer", "new"),
                experts(self.moment.model.config.num_local_experts),
                note="of the token before each new one",
            )  # fmt: skip
        rows = self.moment.likeliest(self.following)
        title = "What could stand at the last place"
        content.table("following", title, ["token", "%"], rows, wide=False)
        if self.branches:
            rows = [[_end(text)] for text in self.branches]
            content.table("branches", "Branches left", ["new text"], rows, wide=False)
        return content

    def summary(self) -> str:
        if not self.written:
            return "Nothing was written yet: press Play or Step."
        last, cache = self.written[-1], self._cache
        held = f"; the cache holds {_live(cache):,.0f} kB of {cache.slots} tokens" if cache else ""
        why = " Play stops here; Step goes on." if len(self.written) >= _MOST else ""
        why = f" ‘{self.moment.word(last.id)}’ ends it." if self._has_ended() else why
        return (
            f"{counted(len(self.written), 'new token')}; the last had "
            f"probability {last.probability:.2f}; the model's distribution there has "
            f"{last.entropy:.1f} bits{held}.{why}"
        )


def _live(cache: KVCache) -> float:
    """Return the kB of keys and values that can still be seen; the buffers have room for more."""
    parts = [part for layer in cache.layers for part in layer.live(slice(None), cache.slots)]
    return sum(part.nbytes for part in parts) / 1e3


def _end(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _TOLD else f"… {text[-_TOLD:].lstrip()}"
