"""The peers' side of the table: transformers, TransformerLens and nnsight on the same weights.

``python peers.py NAME FOLDER`` needs torch and the peer, not llama4_lab. FOLDER holds the model and
`EXPECTED`: what every library must find, or it is not timed. What peers have no call for is done by
PyTorch's hooks, or left out.
"""

import argparse
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from clock import Cell, check_equal, floats, ratios
from safetensors.torch import load_file
from torch import Tensor

EXPECTED = "expected.safetensors"
OURS = "exactness of ours"
FEW = 48  # tokens, where nothing is timed
MOVED, REFUSED, SILENT = "moved", "refused", "silent"


@dataclass(frozen=True)
class Task:
    """Sizes, and which edits stand for all of their kind."""

    layers: int
    heads: int
    experts: int
    tokens: int
    head: int = 1
    expert: int = 2
    factor: float = 0.5  # of the last layer's input, when resuming there

    @property
    def layer(self) -> int:
        return self.layers // 2


class Transformers:
    """transformers by itself, with PyTorch's hooks on its modules."""

    package = "transformers"

    def __init__(self, folder: Path):
        from transformers import Llama4ForCausalLM

        self.model: Any = Llama4ForCausalLM.from_pretrained(folder, attn_implementation="eager")
        text = self.model.config
        counts = text.num_hidden_layers, text.num_attention_heads, text.num_local_experts
        expected = load_file(folder / EXPECTED)
        self.ids = expected.pop("ids")
        self.task = Task(*counts, tokens=self.ids.shape[1])
        self.expected = expected
        self.width = text.hidden_size
        self.reference = Transformers.plain(self, self.ids)
        self.router_weights = [x.feed_forward.router.weight for x in self.model.model.layers]

    def plain(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits

    def routers(self, ids: Tensor) -> tuple[str, list[Tensor]]:
        """Return which of the expected values was traced, and its value in each layer."""
        out = self.model(ids, use_cache=False, output_router_logits=True)
        return "router_logits", list(out.router_logits)

    def everything(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits and what all layers keep."""
        flags = ("output_hidden_states", "output_attentions", "output_router_logits")
        out = self.model(ids, use_cache=False, **dict.fromkeys(flags, True))
        return out.logits, [*out.hidden_states, *out.attentions, *out.router_logits]

    def resumed(self, ids: Tensor) -> Tensor | None:
        """Return logits of a run from the edited input of the last layer, where there is a way."""
        return None

    def headless(self, ids: Tensor) -> Tensor:
        def silence(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            return (self.without_head(args[0].unflatten(-1, (self.task.heads, -1))).flatten(-2),)

        projection = self.model.model.layers[self.task.layer].self_attn.o_proj
        with hooked(projection.register_forward_pre_hook(silence)):
            return self.plain(ids)

    def forced(self, ids: Tensor) -> Tensor:
        def route(module: Any, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self.rerouted(out[0], out[1][-1, self.task.expert]), out[1]

        router = self.model.model.layers[self.task.layer].feed_forward.router
        with hooked(router.register_forward_hook(route)):
            return self.plain(ids)

    def points(self, ids: Tensor) -> list[tuple[str, Callable[[], Tensor]]]:
        """Return the library's own edit points, each with an edited forward pass."""
        return []

    def without_head(self, z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, self.task.head] = 0.0
        return z

    def rerouted(self, scores: Tensor, logit: Tensor) -> Tensor:
        scores = scores.clone()
        scores[-1] = 0.0
        scores[-1, self.task.expert] = logit.sigmoid()
        return scores


class TransformerLens(Transformers):
    package = "transformer_lens"

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import PreTrainedTokenizerFast

        super().__init__(folder)
        words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
        names = {"bos_token": "a", "eos_token": "b", "pad_token": "c"}
        PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # knows its name
        self.bridge: Any = TransformerBridge.boot_transformers(
            str(folder), hf_model=self.model, tokenizer=tokenizer
        )

    def plain(self, ids: Tensor) -> Tensor:
        return self.bridge(ids)

    def routers(self, ids: Tensor) -> tuple[str, list[Tensor]]:
        _, cache = self.bridge.run_with_cache(
            ids, names_filter=lambda name: name.endswith("router.hook_out")
        )
        return "router_scores", list(cache.values())

    def everything(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, cache = self.bridge.run_with_cache(ids)
        return logits, [value for name, value in cache.items() if name.startswith("blocks.")]

    def resumed(self, ids: Tensor) -> Tensor:
        edited = self.expected["last_input"] * self.task.factor
        return self.bridge(edited, start_at_layer=self.task.layers - 1)

    def run(self, ids: Tensor, *hooks: tuple[str, Callable[..., Any]]) -> Tensor:
        return self.bridge.run_with_hooks(ids, fwd_hooks=list(hooks))

    def headless(self, ids: Tensor) -> Tensor:
        name = f"blocks.{self.task.layer}.attn.hook_z"
        return self.run(ids, (name, lambda z, hook: self.without_head(z)))

    def forced(self, ids: Tensor) -> Tensor:
        read: list[Tensor] = []

        def route(scores: Tensor, hook: Any) -> Tensor:
            weight = self.router_weights[self.task.layer][self.task.expert]
            return self.rerouted(scores, read[0][-1] @ weight)

        router = f"blocks.{self.task.layer}.mlp.router."
        note = (router + "hook_in", lambda x, hook: read.append(x))
        return self.run(ids, note, (router + "hook_out", route))

    def points(self, ids: Tensor) -> list[tuple[str, Callable[[], Tensor]]]:
        def edit(name: str) -> Callable[[], Tensor]:
            return lambda: self.run(ids, (name, lambda value, hook: nudge(value)))

        return [(name, edit(name)) for name in self.bridge.hook_dict]


class NNsight(Transformers):
    package = "nnsight"

    def __init__(self, folder: Path):
        from nnsight import NNsight as Wrapped

        super().__init__(folder)
        self.wrapped: Any = Wrapped(self.model)

    def routers(self, ids: Tensor) -> tuple[str, list[Tensor]]:
        with self.wrapped.trace(ids, use_cache=False):
            found = [x.feed_forward.router.output[1] for x in self.wrapped.model.layers]
            stacked: Any = torch.stack(found)
            stacked = stacked.save()
        return "router_logits", list(stacked)

    def everything(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        with self.wrapped.trace(ids, use_cache=False) as tracer:
            cache = tracer.cache()
            logits = self.wrapped.output.logits.save()
        inside = [cache[name].output for name in tuple(cache.keys()) if ".layers." in name]
        return logits, [each for value in inside for each in tensors(value)]

    def resumed(self, ids: Tensor) -> Tensor:
        edited = self.expected["last_input"] * self.task.factor
        with self.wrapped.trace(ids, use_cache=False):
            for layer in self.wrapped.model.layers[:-1]:
                layer.skip(edited)
            logits = self.wrapped.output.logits.save()
        return logits

    def headless(self, ids: Tensor) -> Tensor:
        with self.wrapped.trace(ids, use_cache=False):
            projection = self.wrapped.model.layers[self.task.layer].self_attn.o_proj
            z = projection.input.unflatten(-1, (self.task.heads, -1))
            projection.input = self.without_head(z).flatten(-2)
            logits = self.wrapped.output.logits.save()
        return logits

    def forced(self, ids: Tensor) -> Tensor:
        with self.wrapped.trace(ids, use_cache=False):
            router = self.wrapped.model.layers[self.task.layer].feed_forward.router
            scores, found = router.output
            router.output = (self.rerouted(scores, found[-1, self.task.expert]), found)
            logits = self.wrapped.output.logits.save()
        return logits

    def points(self, ids: Tensor) -> list[tuple[str, Callable[[], Tensor]]]:
        with self.wrapped.trace(ids, use_cache=False) as tracer:
            cache = tracer.cache()
        cached = tuple(cache.keys())
        names = [name.removeprefix("model.") for name in cached if name.count(".") > 1]

        def edit(name: str) -> Tensor:
            with self.wrapped.trace(ids, use_cache=False):
                module = self.wrapped.get(name)
                module.output = nudge(module.output)
                logits = self.wrapped.output.logits.save()
            return logits

        return [(name, lambda name=name: edit(name)) for name in names]


PEERS = {peer.package: peer for peer in (Transformers, TransformerLens, NNsight)}


# ---- rows


def routers(peer: Transformers, repeats: int) -> dict[str, Cell]:
    what, values = peer.routers(peer.ids)
    check_equal("routers", torch.stack([v.flatten(0, -2) for v in values]), peer.expected[what])
    calls = {"routers": lambda: peer.routers(peer.ids)}
    return ratios(lambda: peer.plain(peer.ids), calls, 3 * repeats)


def everything(peer: Transformers, repeats: int) -> dict[str, Cell]:
    ids, kept = peer.ids, []
    check_equal("everything", peer.everything(ids)[0], peer.expected["logits"])
    for some in (ids, ids.repeat(1, 2)):
        size = floats(peer.everything(some)[1])
        kept.append(size / (some.shape[1] * peer.task.layers * peer.width))
    cells = ratios(
        lambda: peer.plain(ids), {"everything": lambda: peer.everything(ids)}, max(3, repeats // 2)
    )
    return cells | {"everything_floats": kept_cell(peer.task.tokens, kept)}


def resume(peer: Transformers, repeats: int) -> dict[str, Cell]:
    if (found := peer.resumed(peer.ids)) is None:
        return {}
    check_equal("resumed", found, peer.expected["resumed"])
    calls = {"resume_logits": lambda: peer.resumed(peer.ids)}
    return ratios(lambda: peer.plain(peer.ids), calls, repeats)


def heads(peer: Transformers, repeats: int) -> dict[str, Cell]:
    check_equal("one head ablated", peer.headless(peer.ids), peer.expected["headless"])
    calls = {"heads": lambda: peer.headless(peer.ids)}
    return ratios(lambda: peer.plain(peer.ids), calls, max(3, repeats // 2))


def counterfactual(peer: Transformers, repeats: int) -> dict[str, Cell]:
    check_equal("one token forced", peer.forced(peer.ids), peer.expected["forced"])
    each = 1 / (peer.task.layers * peer.task.experts)
    calls = {"counterfactual": lambda: peer.forced(peer.ids)}
    return ratios(lambda: peer.plain(peer.ids), calls, max(3, repeats // 2), per=each)


def honesty(peer: Transformers, repeats: int) -> dict[str, Cell]:
    few = peer.ids[:, :FEW]
    points = peer.points(few)
    return {"honesty": honesty_cell(dict(points), peer.plain(few))} if points else {}


def exactness(peer: Transformers, repeats: int) -> dict[str, Cell]:
    return {
        "exactness": difference_cell(peer.plain(peer.ids), peer.reference),
        OURS: difference_cell(peer.expected["logits"], peer.reference),
    }


MEASURES = {
    each.__name__: each
    for each in (routers, everything, resume, heads, counterfactual, honesty, exactness)
}


# ---- what our side uses as well


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in tensors(part)] if isinstance(value, list | tuple) else []


def nudge(value: Any) -> Any:
    """Change every number of a value: none of them alike, and not by much."""
    if isinstance(value, list | tuple):
        return type(value)(nudge(part) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bool:
        return ~value
    if not (value.is_floating_point() or value.is_complex()):
        return (value + 1) % max(2, int(value.max()) + 1)
    generator = torch.Generator().manual_seed(0)
    return value * (0.5 + torch.rand(value.shape, generator=generator))


def outcome(edit: Callable[[], Tensor], plain: Tensor) -> str:
    """Say what came of an edit: logits that moved, a warning or an error, or nothing at all."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            moved = not torch.equal(edit(), plain)
        except Exception:
            return REFUSED
    return MOVED if moved else REFUSED if said else SILENT


def honesty_cell(edits: Mapping[str, Callable[[], Tensor]], plain: Tensor) -> Cell:
    """Count the edits that change nothing and say nothing."""
    outcomes = {name: outcome(edit, plain) for name, edit in edits.items()}
    silent = [name for name, what in outcomes.items() if what == SILENT]
    refused = sum(what == REFUSED for what in outcomes.values())
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in silent})
    note = f"{refused} of {len(edits)} edits refused or warned of"
    if kinds:
        note += f"; silent: {', '.join(kinds)}"
    return Cell(f"{len(silent)} of {len(edits)}", len(silent), note)


def kept_cell(tokens: int, kept: Sequence[float]) -> Cell:
    """Show what is kept of `tokens` tokens and of twice as many."""
    once, twice = kept
    return Cell(f"{once:.1f}, {twice:.1f} at {2 * tokens}", max(kept))


def difference_cell(found: Tensor, reference: Tensor) -> Cell:
    largest = (found - reference).abs().max().item()
    return Cell(f"{largest:.1e}" if largest else "0", largest)


# ---- in the peer's interpreter


def measure(name: str, folder: Path, only: Sequence[str], repeats: int) -> dict[str, Cell]:
    """Run the rows that a peer has; what it cannot do right says why."""
    peer = PEERS[name](folder)
    check_equal("logits", peer.plain(peer.ids), peer.expected["logits"])
    cells: dict[str, Cell] = {}
    for row in only:
        try:
            cells |= MEASURES[row](peer, repeats)
        except Exception as error:
            cells[row] = Cell("failed", note=f"{type(error).__name__}: {error}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(MEASURES))
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    if importlib.util.find_spec(given.name) is None:
        print(json.dumps({"version": "", "cells": {}}))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    cells = measure(given.name, given.folder, given.only.split(","), given.repeats)
    print(json.dumps({"version": version(given.name), "cells": cells}))


if __name__ == "__main__":
    main()
