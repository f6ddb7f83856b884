"""Edited runs that begin where they first differ from a clean one.

A `Replay` keeps one clean pass: the residual stream around each layer, keys and values, routing.
An edited run takes over what stands before its earliest touched point and token, and computes the
rest; many runs share the batches, each joining at the layer where it begins. `variants` holds what
one of them is.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from llama4_lab.cache import SharedPast
from llama4_lab.edits import Edit, check, not_one_row, read_sources, ruled
from llama4_lab.edits.base import CLEAN
from llama4_lab.model import Llama4
from llama4_lab.model.text import DecoderLayer, Step
from llama4_lab.points import PICTURE, points
from llama4_lab.replay.variants import Evidence, Rows, Variant
from llama4_lab.trace import inputs_of, intervene, trace, unobserved

_KEPT = ("resid_pre", "attn.rot_k", "attn.v", "attn.z", "resid_mid", "resid_post")
_SPARE_TOKENS = 64  # computed again to save a pass: reading the weights costs about as much


class Replay:
    """One clean pass over a prompt, and edited runs of it.

        >>> replay = Replay(model, prompt)                                  # doctest: +SKIP
        >>> replay.edited([DropExpert(3, expert=7)]).effect.kl.max()        # doctest: +SKIP

    `prompt` is what ``model.prompt`` returns, a text, or token ids. `sources` are other runs, by
    name, that edits take values from; "clean" is always this one. A pass holds at most
    `max_tokens` tokens of all runs together; `progress` shows a bar where many take long. Edited
    runs have their own edits and no others: `trace` around them sees nothing, and inside
    `intervene` they are refused. Whole runs, by `llama4_lab.edits.edited`, can be traced.

    Raises:
        ValueError: a prompt of several rows, or with padding; a block of `intervene` around it; a
            hook on a layer.
    """

    def __init__(
        self,
        model: Llama4,
        prompt: Any,
        sources: Mapping[str, Any] | None = None,
        *,
        max_tokens: int = 2048,
        progress: bool = True,
    ):
        _refuse_changes_around(model)
        self.model = model
        self.inputs = inputs_of(model, prompt)
        self.ids: Int[Tensor, " t"] = self.inputs["input_ids"][0].long()
        self.sources = {**(sources or {}), CLEAN: self.inputs}
        self.max_tokens = max_tokens
        self.progress = progress
        if what := not_one_row(self.inputs):
            raise ValueError(f"one row without padding can be replayed, not {what}")
        names = [f"layers.*.{part}" for part in _KEPT] + ["embed", "final_norm"]
        if model.config.routed_layers:
            names.append("layers.*.router.*")
        self._kept: dict[str, Tensor] = {}
        self._keep(names)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def hidden(self) -> Float[Tensor, "t d"]:
        """What the read-out sees in the clean run."""
        return self._kept["final_norm"][0]

    @property
    def experts(self) -> dict[int, Int[Tensor, "t topk"]]:
        """The experts chosen in the clean run, by MoE layer."""
        layers = self.model.config.routed_layers
        return {i: self._kept[f"layers.{i}.router.indices"][0] for i in layers}

    @cached_property
    def logits(self) -> Float[Tensor, "t v"]:
        """The clean run's logits."""
        with torch.no_grad():
            return self.model.lm_head(self.hidden)

    def bytes(self) -> int:
        """Bytes that the clean run keeps."""
        storages = (value.untyped_storage() for value in self._kept.values())
        return sum({each.data_ptr(): each.nbytes() for each in storages}.values())

    def edited(self, edits: Sequence[Edit], *, keep: Collection[str] = ()) -> "Edited":
        """Run with edits, from the first point and token that they touch.

        `keep` are points of which `Edited.value` tells the values; the clean run's are kept by one
        more pass, when they are first asked for.

        Raises:
            ValueError: an edit that this model or prompt cannot have, a point that has no token of
                the prompt to each value, a model divided among ranks that is to keep some, or a
                block of `intervene` around it.
            KeyError: a source that was not given.
        """
        known = points(self.model.config)
        for point in keep:
            if not known.get(point, "").startswith("b t") or point.startswith(PICTURE):
                raise ValueError(f"{point!r} cannot be kept: it has no axes b t of the prompt")
        if keep and self.model.ranks.size > 1:
            raise ValueError("a model that is divided among ranks keeps no values of edited runs")
        ((_, found),) = self.stream([edits], keep=keep)
        clean = {point for point in keep if found.first or point not in found.kept}
        with unobserved(self.model):
            self._keep(clean - self._kept.keys() - {"logits"})
        return found

    @torch.no_grad()
    def _keep(self, names: Collection[str]) -> None:
        """Run the prompt and keep named values."""
        if names:
            with trace(self.model, names) as kept:
                self.model.hidden(**self.inputs)
            mine = self.model.ranks.mine
            self._kept |= {name: mine(name, value) for name, value in kept.items()}

    def many(self, runs: Sequence[Sequence[Edit]]) -> list["Edited"]:
        """Run each list of edits by itself, many in one pass; results are in the order given."""
        done = dict(self.stream(runs))
        return [done[i] for i in range(len(runs))]

    def stream(
        self, runs: Sequence[Sequence[Edit]], *, keep: Collection[str] = ()
    ) -> Iterator[tuple[int, "Edited"]]:
        """Yield each run with its place in `runs`, pass by pass, in the order that costs least.

        For more runs than fit into memory, and for work that is to be stopped on the way. Between
        two of them the model is as it was before. `keep` is as for `edited`, which sees to the
        clean run's values.
        """
        _refuse_changes_around(self.model)
        for edits in runs:
            self._check(edits)
        with torch.no_grad():
            wanted = [edit for edits in runs for edit in edits]
            values = read_sources(self.model, wanted, self.sources)
        variants = [
            Variant(i, edits, self.model, values, len(self)) for i, edits in enumerate(runs)
        ]
        # In a notebook a bar is widgets: none for the one run that a slider asks for.
        is_silent = len(runs) < 2 or not self.progress
        with tqdm(
            total=len(runs), desc="edited runs", unit="run", delay=2, disable=is_silent
        ) as bar:
            for batch in self._batches(variants):
                yield from self._run(batch, keep).items()
                bar.update(len(batch))

    def _check(self, edits: Sequence[Edit]) -> None:
        config = self.model.config
        check(edits, config, len(self))
        if self.inputs.get("pixel_values") is not None:
            return
        for edit in edits:
            if seen := [point for point in edit.changes(config) if point.startswith(PICTURE)]:
                raise ValueError(f"{edit}: this prompt has no picture, so it has no {seen[0]}")

    def _batches(self, variants: list[Variant]) -> Iterator[list[Variant]]:
        """Put together what has the same rules and begins at nearly the same token.

        A pass reads all weights, so it computes a few tokens again rather than being another one.
        Where experts are read from files, all runs of the same rules share the passes. The earliest
        layers come first.
        """
        spare = math.inf if self.model.expert_memory is not None else _SPARE_TOKENS
        together: list[list[Variant]] = []
        for _, found in groupby(sorted(variants, key=Variant.kind), key=Variant.kind):
            alike, group = list(found), together[-1] if together else []
            again = len(alike) * (alike[0].first - group[0].first) if group else math.inf
            if group and group[0].rules == alike[0].rules and again <= spare:
                group += alike
            else:
                together.append(alike)
        for group in together:
            most = max(1, self.max_tokens // max(1, len(self) - group[0].first))
            group.sort(key=lambda variant: variant.begin)
            for i in range(0, len(group), most):
                yield group[i : i + most]

    @torch.no_grad()
    def _run(self, variants: list[Variant], keep: Collection[str]) -> dict[int, "Edited"]:
        rows, first = Rows(variants, keep), min(variant.first for variant in variants)
        rules = ruled(self.model, variants[0].edits)
        with self._reading_from(first), rules, closing(rows.witness):
            hidden = self._pass(variants, first, rows)
        found = {}
        for row, variant in enumerate(variants):
            own = slice(variant.first - first, None)
            known = {p: value[row] for p, value in rows.kept.items() if row < len(value)}
            found[variant.index] = Edited(
                replay=self,
                edits=tuple(variant.edits),
                first=variant.first,
                hidden=hidden[row, own],
                asked=frozenset(keep),
                kept={point: value[own] for point, value in known.items()},
                evidence=rows.evidence(row),
                change_logits=variant.change("logits"),
            )
        return found

    def _pass(self, variants: list[Variant], first: int, rows: Rows) -> Float[Tensor, "b t d"]:
        """Run the positions from `first` on, each variant from where it begins."""
        layers = cast(list[DecoderLayer], list(self.model.layers))

        def join(x: Tensor | None, part: str, begin: tuple[int, int]) -> Tensor | None:
            count = sum(variant.begin == begin for variant in variants)
            if not count:
                return x
            clean = self._kept[part][:, first:]
            joined = clean.expand(count, *clean.shape[1:])
            return joined if x is None else torch.cat([x, joined])

        step = cache(lambda batch_size: self._step(batch_size, first))  # rows join on the way
        x = self._embedded(variants, first, rows)
        for i, layer in enumerate(layers):
            at, z = f"layers.{i}.", None
            tap = rows.scope(at)
            if (x := join(x, at + "resid_pre", (i, 0))) is not None:
                x, z = layer.mix(x, step(len(x)), tap)
            z = join(z, at + "attn.z", (i, 1))
            x = join(x, at + "resid_pre", (i, 1))
            if x is not None and z is not None:
                x = layer.write(x, z, tap)
            if (x := join(x, at + "resid_mid", (i, 2))) is not None:
                x = layer.feed(x, tap, self.model.backend)
        x = join(x, f"layers.{len(layers) - 1}.resid_post", (len(layers), 0))
        assert x is not None
        x = rows("final_norm", self.model.norm(x))
        if rows.alters("final_norm"):
            self.model.lm_head(x)  # logits are made when they are asked for; it is seen here
        return x

    def _embedded(
        self, variants: list[Variant], first: int, rows: Rows
    ) -> Float[Tensor, "b t d"] | None:
        """Return the input of the first layer for variants that change it."""
        found = []
        for row, variant in enumerate(variants):
            if variant.begin[0] == -1:
                embed = self._kept["embed"]
                if seen := [point for point in variant.changes if point.startswith(PICTURE)]:
                    watched = {point: rows.watched(row, point) for point in seen}
                    with unobserved(self.model), intervene(self.model, watched):
                        pixels = self.inputs.get("pixel_values")
                        embed = self.model.embed(self.inputs["input_ids"], pixels)
                found.append(embed[:, first:])
        return rows("embed", torch.cat(found)) if found else None

    def _step(self, batch_size: int, first: int) -> Step:
        past = None
        if first:
            keys, values = (
                [
                    rearrange(self._kept[f"layers.{i}.attn.{part}"], "b t k dh -> b k t dh")
                    for i in range(len(self.model.layers))
                ]
                for part in ("rot_k", "v")
            )
            past = SharedPast(keys, values, self.model.chunks, first, batch_size)
        t = len(self) - first
        return Step.begin(self.model.config, t, [0] * batch_size, past, self.model.device)

    @contextmanager
    def _reading_from(self, first: int) -> Iterator[None]:
        before, self.model.first_slot = self.model.first_slot, first
        try:
            yield
        finally:
            self.model.first_slot = before


@dataclass(frozen=True, eq=False)
class Effect:
    """What an edit did to the predictions from its first position on; n positions."""

    positions: Int[Tensor, " n"]
    kl: Float[Tensor, " n"]  # nats, of the edited from the clean distribution
    loss_change: Float[Tensor, " n"]  # nats on the prompt's next token; not a number at its end
    top_changed: Bool[Tensor, " n"]
    flips: dict[int, int]  # tokens whose experts changed, by MoE layer
    evidence: dict[str, Evidence]  # by changed point

    @property
    def unseen(self) -> list[str]:
        """Points whose value was changed without any operation reading the change."""
        return [p for p, found in self.evidence.items() if found.changed and not found.used_by]

    def __str__(self) -> str:
        loss = self.loss_change[~self.loss_change.isnan()]
        first, last, strongest = self.positions[[0, -1, int(self.kl.argmax())]].tolist()
        mean, most = f"{self.kl.mean():.4f}", f"{self.kl.max():.4f} nats at token {strongest}"
        apart = most if first == last else f"mean {mean} over tokens {first} to {last}, most {most}"
        flips = sum(self.flips.values())
        text = (
            f"KL from the clean run: {apart}; top token changed at "
            f"{int(self.top_changed.sum())} of {len(self.kl)}; {flips} "
            f"routing flip{'s' * (flips != 1)}"
        )
        if len(loss):
            text += f"; loss {loss.mean():+z.4f} nats a token"
        return text + (f"; NOT SEEN by the model: {', '.join(self.unseen)}" if self.unseen else "")


@dataclass(frozen=True, eq=False)
class Edited:
    """An edited run, from position `first` on; before it the clean run holds."""

    replay: Replay
    edits: tuple[Edit, ...]
    first: int
    hidden: Float[Tensor, "t d"]  # what the read-out sees, from `first` on
    asked: frozenset[str]  # points to keep
    kept: dict[str, Tensor]  # by point, from `first` on: of routers, and what was asked for
    evidence: dict[str, Evidence]
    change_logits: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        return f"Edited({list(self.edits)}): {self.effect}"

    @cached_property
    def logits(self) -> Float[Tensor, "t v"]:
        """The logits of the whole prompt."""
        mine = self.logits_of(slice(None))
        return torch.cat([self.replay.logits[: self.first], mine]) if self.first else mine

    @torch.no_grad()
    def logits_of(self, which: slice) -> Float[Tensor, "n v"]:
        """Return logits of some of the positions from `first` on; ``slice(-1, None)``: the last.

        Raises:
            ValueError: a slice with steps.
        """
        model = self.replay.model
        begin, end, step = which.indices(len(self.hidden))
        if step != 1:
            raise ValueError(f"{which} has steps: give neighbours, and choose among their logits")
        with self.replay._reading_from(self.first + begin):
            return self.change_logits(model.lm_head(self.hidden[None, begin:end]))[0]

    @cached_property
    def effect(self) -> Effect:
        """What the edits did, in nats, tokens and flips."""
        clean = self.replay.logits[self.first :].float().log_softmax(dim=-1)
        mine = self.logits_of(slice(None)).float().log_softmax(dim=-1)
        following = self.replay.ids[self.first + 1 :, None]
        loss_change = (clean[:-1].gather(-1, following) - mine[:-1].gather(-1, following))[:, 0]
        return Effect(
            positions=torch.arange(self.first, len(self.replay)),
            kl=divergence(mine, clean),
            loss_change=F.pad(loss_change, (0, 1), value=float("nan")),
            top_changed=clean.argmax(dim=-1) != mine.argmax(dim=-1),
            flips={i: self._flips(i) for i in self.replay.experts},
            evidence=self.evidence,
        )

    def router(self, layer: int, part: str) -> Shaped[Tensor, "t _"]:
        """Return "logits", "indices" or "scores" of a MoE layer's router, for the whole prompt.

        Raises:
            ValueError: a layer without a router, or another part.
        """
        point = f"layers.{layer}.router.{part}"
        if point not in self.replay._kept:
            layers = ", ".join(map(str, self.replay.experts)) or "none"
            raise ValueError(
                f"there is no {point}: MoE layers are {layers}, parts logits, indices and scores"
            )
        return self.value(point)[0]

    def value(self, point: str) -> Shaped[Tensor, "1 t *axes"]:
        """Return the value of a point that was kept, for the whole prompt.

        Raises:
            KeyError: a point that was not kept.
        """
        if point == "logits":
            return self.logits[None]
        mine = self.hidden if point == "final_norm" else self.kept.get(point)
        if mine is None and point not in self.asked and ".router." not in point:
            raise KeyError(f"{point} was not kept of this run: ask for it, keep=[{point!r}]")
        if mine is not None and not self.first:
            return mine[None]
        clean = self.replay._kept[point]
        return clean if mine is None else torch.cat([clean[:, : self.first], mine[None]], dim=1)

    def _flips(self, layer: int) -> int:
        point = f"layers.{layer}.router.indices"
        if point not in self.kept:
            return 0
        clean = self.replay.experts[layer][self.first :].sort(dim=-1).values
        mine = self.kept[point].sort(dim=-1).values
        if clean.shape != mine.shape:  # another number of experts each
            return len(mine)
        return int((clean != mine).any(dim=-1).sum())


def _refuse_changes_around(model: Llama4) -> None:
    if model.tap.records() is None:
        raise ValueError(
            "this stands inside a block of intervene or edited, whose changes replayed runs would "
            "not have: leave the block, or give the changes as edits"
        )
    for i, layer in enumerate(model.layers):
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
            raise ValueError(
                f"layers.{i} has a hook, or a forward that was put there, which replayed runs "
                "would not call: remove it, or give what it changes as edits"
            )


def divergence(
    mine: Float[Tensor, "*runs v"], clean: Float[Tensor, "*runs v"]
) -> Float[Tensor, "*runs"]:
    """Return KL(clean ‖ mine) of log-probabilities, in nats.

    What is impossible in the clean run adds nothing.
    """
    parts = F.kl_div(mine, clean, reduction="none", log_target=True)
    return parts.masked_fill_(clean == -math.inf, 0).sum(dim=-1).clamp(min=0)
