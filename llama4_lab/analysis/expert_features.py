"""Routed experts and the routers' decisions as features of `llama4_lab.analysis.attribution`.

A gate multiplies the router's score. The score multiplies the expert's input, and a SwiGLU without
biases maps zero to zero: gate 0 removes what the expert adds, and changes nothing else.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.analysis.features import NEXT_TOKEN, Features, Question, Target
from llama4_lab.analysis.routing import moe_layers
from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt
from llama4_lab.trace import Change, trace

Gates = Callable[
    [Float[Tensor, "rows choices"], Int[Tensor, "rows t topk"]], Float[Tensor, "rows t topk"]
]


def expert_features(
    model: Llama4,
    prompt: Prompt,
    target: Target = NEXT_TOKEN,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Features:
    """Let routed experts be turned off, each for all tokens that come to it.

    Args:
        pairs: (layer, expert) of each feature; other experts always stay. None takes every expert
            of every MoE layer: with all off, only the shared experts are left.

    Raises:
        ValueError: a pair that is not there or is given twice, a model without MoE layers, and as
            `Question.ask`.
    """

    def of_expert(on: Tensor, chosen: Tensor) -> Tensor:
        return on.gather(1, chosen.flatten(1)).view(chosen.shape)

    question = Question.ask(model, prompt, target)
    return _gated(question, "expert", model.config.num_local_experts, pairs, of_expert)


def decision_features(
    model: Llama4,
    prompt: Prompt,
    target: Target = NEXT_TOKEN,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Features:
    """Let the routers' decisions be undone: a token then passes a layer without routed experts.

    Args:
        pairs: (layer, token) of each feature; other decisions always stand. None takes every token
            at every MoE layer.

    Raises:
        ValueError: a pair that is not there or is given twice, a model without MoE layers, and as
            `Question.ask`.
    """

    def of_token(on: Tensor, chosen: Tensor) -> Tensor:
        return on[..., None].expand(chosen.shape)

    question = Question.ask(model, prompt, target)
    return _gated(question, "token", len(prompt.tokens), pairs, of_token)


def _gated(
    question: Question,
    what: str,
    count: int,
    pairs: Sequence[tuple[int, int]] | None,
    gates: Gates,
) -> Features:
    """Build features that multiply scores; `gates` says which gate each choice of a layer gets."""
    layers = moe_layers(question.model)
    if pairs is None:
        pairs = [(layer, idx) for layer in layers for idx in range(count)]
    for layer, idx in pairs:
        if layer not in layers or not 0 <= idx < count:
            known = ", ".join(map(str, layers))
            raise ValueError(
                f"there is no pair (layer {layer}, {what} {idx}): MoE layers are {known}, "
                f"{what}s 0 to {count - 1}"
            )
    places = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    own = {
        layer: np.flatnonzero(places[:, 0] == layer) for layer in sorted({*places[:, 0].tolist()})
    }

    def value(on: Tensor, fixed_routing: bool) -> Tensor:
        def change(layer: int) -> Change:
            all_of_layer = on.new_ones(len(on), count)
            all_of_layer[:, places[own[layer], 1]] = on[:, own[layer]]

            def scale(score: Tensor) -> Tensor:
                chosen = cache[f"layers.{layer}.router.indices"]
                return score * gates(all_of_layer, chosen).to(score.dtype)

            return scale

        changes = {f"layers.{layer}.router.scores": change(layer) for layer in own}
        with trace(question.model, "layers.*.router.indices") as cache:
            return question.answer(len(on), changes, fixed_routing)

    labels = [f"layer {layer}, {what} {idx}" for layer, idx in places]
    device = question.embedding.device
    return Features(("layer", what), places, labels, value, question.target, device)
