"""Stages on one MoE layer: every backend beside transformers' layer and the roofline."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from llama4_lab import experts
from llama4_lab.bench.base import Bench, Row, counted
from llama4_lab.bench.weights import seeded, seeded_packed
from llama4_lab.config import Llama4Config
from llama4_lab.packed import cat
from llama4_lab.plan import moe_layer_bytes, moe_layer_flops

_LAYERS = 2  # sets of weights that take turns, so that no cache holds them,
_ROOM = 20e9  # and fewer if they take more bytes in bfloat16
_INPUTS = 4  # of each set, likewise
_OFF = 2e-2  # of a token's output, relative; bfloat16 has 8 bits,
_OFF_FP8 = 0.1  # and rows in fp8 have 4
_STRAYED = 0.01  # share of tokens that may be off: a near tie sends one to another expert
_FEW = 64  # tokens up to which the whole block is tried in one call
_FEWEST = 1  # and up to which `gather` is compiled, which takes seconds
_SHARE_GOALS = {"bf16": {1: 0.85}, "int4": {1: 0.75, 8: 0.75, 64: 0.70}}
_PROMPT_GOALS = {"bf16": 0.85, "int4": 0.70}
_FASTER = 7.5  # than transformers
_PEER = "transformers"


@dataclass(frozen=True)
class Layer:
    """One MoE layer's weights."""

    router: Tensor
    gate_up: Any  # Tensor | Packed, here and below
    down: Any
    shared: tuple[Any, ...]  # gate, up, down

    @classmethod
    def seeded(cls, config: Llama4Config, kind: str, generator: torch.Generator) -> "Layer":
        d, f, e = config.hidden_size, config.intermediate_size, config.num_local_experts
        router = seeded("router.weight", torch.Size((e, d)), config, generator)
        shapes = (e, 2 * f, d), (e, d, f), (f, d), (f, d), (d, f)
        weights = [seeded_packed("", torch.Size(s), kind, config, generator) for s in shapes]
        return cls(router, weights[0], weights[1], tuple(weights[2:]))

    def unpacked(self) -> "Layer":
        """Return the same layer in bfloat16, unpacked one expert at a time."""
        gate_up, down = (
            torch.stack([w[i].unpack(torch.bfloat16) for i in range(len(w))])
            for w in (self.gate_up, self.down)
        )
        gate, up, shared_down = (w.unpack(torch.bfloat16) for w in self.shared)
        return Layer(self.router, gate_up, down, (gate, up, shared_down))


Path = Callable[[Layer, Tensor], Tensor]


def layer_rows(bench: Bench) -> Iterator[Row]:
    """One MoE layer of a decode step, for several numbers of rows; none in a dense model."""
    if not bench.config.routed_layers:
        return
    layers = _layers(bench)
    for n in bench.scale.layer_rows:
        for kind, sets in layers.items():
            floor = moe_layer_bytes(bench.config, n, kind) / bench.gpu.bandwidth
            yield from _rows(bench, n, kind, sets, floor, _SHARE_GOALS.get(kind, {}).get(n))


def layer_prompt(bench: Bench) -> Iterator[Row]:
    """One MoE layer of a prompt's prefill; none in a dense model."""
    if not bench.config.routed_layers:
        return
    n = bench.scale.layer_prompt
    rate = bench.gpu.fp8 if bench.kind == "fp8" else bench.gpu.bf16
    for kind, sets in _layers(bench).items():
        math = moe_layer_flops(bench.config, n) / (rate if kind != "bf16" else bench.gpu.bf16)
        floor = max(math, moe_layer_bytes(bench.config, n, kind) / bench.gpu.bandwidth)
        yield from _rows(bench, n, kind, sets, floor, _PROMPT_GOALS.get(kind))


def _layers(bench: Bench) -> dict[str, list[Layer]]:
    """Return layers of the kind under test, and the same ones in bfloat16."""
    generator = bench.generator()
    kind = "int4" if bench.kind == "bf16" else bench.kind
    size = moe_layer_bytes(bench.config, 10**6)
    sets = max(1, min(_LAYERS, int(_ROOM // size)))
    few = [Layer.seeded(bench.config, kind, generator) for _ in range(sets)]
    return {"bf16": [layer.unpacked() for layer in few], kind: few}


def _rows(
    bench: Bench, n: int, kind: str, layers: list[Layer], floor: float, goal: float | None
) -> Iterator[Row]:
    """Check every path against the readable one, then time them in turns."""
    width, inputs = bench.config.hidden_size, []
    for _ in range(_INPUTS):
        x = torch.randn(n, width, generator=bench.generator(len(inputs)), device=bench.device)
        inputs.append(x.bfloat16())
    turns = [(layer, x) for x in inputs for layer in layers]
    name = f"MoE layer, {counted(n, 'token')}, {kind}"
    calls, notes = _calls(bench, kind, layers, turns)
    ours = {path for path in calls if not path.startswith(_PEER)}
    if not ours:
        raise RuntimeError("; ".join(notes))
    bench.clock.forget_peak()
    times = bench.clock.compare(calls)
    seconds = {path: each / len(turns) for path, each in times.items()}
    best = min(ours, key=seconds.__getitem__)
    slower = sorted(set(seconds) - {best}, key=seconds.__getitem__)
    notes = [f"{path} {seconds[path] * 1e6:,.0f}" for path in slower] + notes
    yield Row(
        name,
        seconds[best] * 1e6,
        "µs",
        share=floor / seconds[best],
        goal=bench.goal(goal, of_share=True) if goal else None,
        peak=bench.clock.peak(),
        note=f"{best}; µs of others: " + ", ".join(notes),
    )
    if peers := [path for path in seconds if path.startswith(_PEER)]:
        yield Row(
            f"{name}, against transformers'",
            min(seconds[peer] for peer in peers) / seconds[best],
            "times",
            goal=bench.goal(_FASTER) if n in (1, bench.scale.layer_prompt) else None,
        )
    if "grouped" in seconds and kind == "bf16":
        yield Row(
            f"{name}, against eager grouped_mm",
            seconds["grouped"] / seconds[best],
            "times",
            goal=bench.goal(1.0),
        )


def _calls(
    bench: Bench, kind: str, layers: list[Layer], turns: list[tuple[Layer, Tensor]]
) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """Return the paths that equal the readable one, each taking all turns, and what hinders others.

    `turns` begin with the same input for each of the layers.
    """
    calls: dict[str, Callable[[], Any]] = {}
    notes: list[str] = []
    x = turns[0][1]
    expected = [_reference(bench, layer)(x) for layer in layers]
    for path, prepare in _paths(bench, len(x), kind, layers).items():
        try:
            run = prepare()
            found = [run(layer, x) for layer in layers]
            _check(found, expected, _OFF_FP8 if kind == "fp8" else _OFF)
        except Exception as error:  # one path must not take the others' figures away
            notes.append(f"{path}: {_first_line(error)}")
            continue

        def call(run: Path = run) -> None:
            for layer, x in turns:
                run(layer, x)

        calls[path] = call
        if bench.clock.is_cuda and path != "loop":  # which always waits for the GPU in between
            try:
                calls[f"{path} in a graph"] = bench.clock.graphed(call)
            except RuntimeError as error:
                bench.clock.wait()
                notes.append(f"{path} in a graph: {_first_line(error)}")
    return calls, notes


def _reference(bench: Bench, layer: Layer) -> Callable[[Tensor], Tensor]:
    plain = layer if isinstance(layer.gate_up, Tensor) else layer.unpacked()
    return lambda x: _backend(bench, "loop")(plain, x)


def _check(found: list[Tensor], expected: list[Tensor], most: float) -> None:
    for ours, right in zip(found, expected, strict=True):
        off = (ours.float() - right.float()).norm(dim=-1) / right.float().norm(dim=-1)
        strayed = (~(off <= most)).float().mean().item()
        if strayed > _STRAYED:
            raise ValueError(f"{strayed:.0%} of tokens are off by more than {most:.0%}; not timed")


def _paths(bench: Bench, n: int, kind: str, layers: list[Layer]) -> dict[str, Callable[[], Path]]:
    """Return how to prepare each way to compute a layer that this device may know."""
    skipped = {"padded"}  # for training
    if bench.clock.is_cuda:
        skipped.add("numba")
    if not find_spec("triton"):  # another would run under its name
        skipped.add("triton")
    found: dict[str, Callable[[], Path]] = {
        name: partial(_backend, bench, name) for name in experts.BACKENDS if name not in skipped
    }
    if kind == "bf16" and bench.clock.is_cuda and n <= _FEWEST:
        found["gather, compiled"] = lambda: torch.compile(_backend(bench, "gather"), dynamic=False)
    if find_spec("triton") and bench.clock.is_cuda and n <= _FEW:
        found["triton block"] = partial(_block, bench, layers)
    if find_spec("transformers") and kind == "bf16":
        found[_PEER] = partial(_transformers, bench, layers)
    return found


def _backend(bench: Bench, name: str) -> Path:
    topk = bench.config.num_experts_per_tok

    def run(layer: Layer, x: Tensor) -> Tensor:
        weights = layer.gate_up, layer.down
        return experts.moe(x, layer.router, weights, layer.shared, topk=topk, backend=name)

    return run


def _block(bench: Bench, layers: list[Layer]) -> Path:
    """The whole block in few launches, the shared expert stacked behind the others."""
    from llama4_lab.experts import triton

    stacks = {}
    for layer in layers:
        gate, up, down = layer.shared
        stacks[id(layer)] = (
            triton.stack_shared(layer.gate_up, cat([gate, up])),
            triton.stack_shared(layer.down, down),
        )
    topk = bench.config.num_experts_per_tok
    return lambda layer, x: triton.moe(x, layer.router, *stacks[id(layer)], topk=topk)


def _transformers(bench: Bench, layers: list[Layer]) -> Path:
    """transformers' layer; its experts lie transposed."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    raw = json.loads(json.dumps(bench.config.to_dict()))  # as read from a file
    config = Llama4TextConfig(**raw.get("text_config", raw))
    modules = {}
    for layer in layers:
        with torch.device("meta"):
            module = Llama4TextMoe(config)
        gate, up, down = layer.shared
        weights = {
            "experts.gate_up_proj": layer.gate_up.mT.contiguous(),
            "experts.down_proj": layer.down.mT.contiguous(),
            "router.weight": layer.router,
            "shared_expert.gate_proj.weight": gate,
            "shared_expert.up_proj.weight": up,
            "shared_expert.down_proj.weight": down,
        }
        module.load_state_dict(weights, assign=True)
        modules[id(layer)] = module
    return lambda layer, x: modules[id(layer)](x)[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__
