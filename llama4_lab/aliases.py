"""From the names and patterns that people write to points; TransformerLens's names are welcome.

One table says which of its hooks stands for which point, and where the meaning differs. Axes are
ours; where no difference is told they are theirs, too.
"""

import difflib
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from llama4_lab.config import Llama4Config
from llama4_lab.points import PICTURE, points


class Alias(NamedTuple):
    hook: str  # {i} is the layer
    point: str
    difference: str = ""


ALIASES = (
    Alias("hook_embed", "embed", "image features are in it already"),
    Alias("embed.hook_out", "embed", "image features are in it already"),
    Alias("blocks.{i}.hook_in", "layers.{i}.resid_pre"),
    Alias("blocks.{i}.hook_resid_pre", "layers.{i}.resid_pre"),
    Alias("blocks.{i}.attn.hook_q", "layers.{i}.attn.q"),
    Alias("blocks.{i}.attn.hook_k", "layers.{i}.attn.k"),
    Alias("blocks.{i}.attn.hook_v", "layers.{i}.attn.v"),
    Alias(
        "blocks.{i}.attn.hook_rot_q",
        "layers.{i}.attn.rot_q",
        "after QK norm and temperature too; also on NoPE layers, which rotate nothing",
    ),
    Alias(
        "blocks.{i}.attn.hook_rot_k",
        "layers.{i}.attn.rot_k",
        "after QK norm too; also on NoPE layers, which rotate nothing",
    ),
    Alias(
        "blocks.{i}.attn.hook_attn_scores",
        "layers.{i}.attn.scores",
        "before the softmax, as in HookedTransformer; TransformerLens 4.3 shows Llama 4's pattern",
    ),
    Alias(
        "blocks.{i}.attn.hook_pattern",
        "layers.{i}.attn.pattern",
        "a change is used by the model; TransformerLens 4.3 ignores it on Llama 4",
    ),
    Alias("blocks.{i}.attn.hook_z", "layers.{i}.attn.z"),
    Alias("blocks.{i}.attn.hook_out", "layers.{i}.attn.out"),
    Alias("blocks.{i}.hook_attn_out", "layers.{i}.attn.out"),
    Alias("blocks.{i}.hook_resid_mid", "layers.{i}.resid_mid"),
    Alias(
        "blocks.{i}.mlp.hook_post",
        "layers.{i}.mlp.hidden",
        "dense layers only; neurons, as in HookedTransformer",
    ),
    Alias("blocks.{i}.mlp.hook_out", "layers.{i}.mlp.out", "dense layers only"),
    Alias("blocks.{i}.hook_mlp_out", "layers.{i}.mlp.out", "dense layers only"),
    Alias(
        "blocks.{i}.mlp.hook_router_scores",
        "layers.{i}.router.logits",
        "logits here as there, but with axes b t e, and a change is used by the model",
    ),
    Alias("blocks.{i}.mlp.hook_expert_indices", "layers.{i}.router.indices"),
    Alias(
        "blocks.{i}.mlp.hook_expert_weights",
        "layers.{i}.router.scores",
        "sigmoids of the chosen logits; they do not sum to one and multiply the expert's input",
    ),
    Alias("blocks.{i}.mlp.shared_expert.hook_out", "layers.{i}.shared.out"),
    Alias("blocks.{i}.hook_out", "layers.{i}.resid_post"),
    Alias("blocks.{i}.hook_resid_post", "layers.{i}.resid_post"),
    Alias(
        "ln_final.hook_normalized",
        "final_norm",
        "after the norm's weight, which TransformerLens multiplies in behind this hook",
    ),
    Alias("ln_final.hook_out", "final_norm"),
    Alias("unembed.hook_in", "final_norm"),
    Alias("unembed.hook_out", "logits"),
    Alias("hook_logits", "logits"),
    Alias("vision_encoder.hook_out", "vision.out"),
    Alias("vision_projector.hook_out", "projector.out"),
)

# What has no point on a MoE layer, and what to take there.
ON_MOE = {
    "blocks.{i}.mlp.hook_post": "take 'layers.{i}.experts.hidden'; the shared expert has none",
    "blocks.{i}.mlp.hook_out": (
        "take 'layers.{i}.experts.out', summed over topk, and 'layers.{i}.shared.out': it is their "
        "sum"
    ),
}
ON_MOE["blocks.{i}.hook_mlp_out"] = ON_MOE["blocks.{i}.mlp.hook_out"]

# Hooks without a point on any layer, and what to take.
WITHOUT_POINT = {
    "hook_pos_embed": "positions enter by rotating q and k: take 'layers.{i}.attn.rot_q' and rot_k",
    "blocks.{i}.attn.hook_result": (
        "what one head adds to the stream is 'layers.{i}.attn.z' of the head times its columns of "
        "o_proj"
    ),
    "blocks.{i}.mlp.hook_pre": "take 'layers.{i}.mlp.hidden' or 'experts.hidden', behind the gate",
    "blocks.{i}.mlp.router.hook_out": (
        "take 'layers.{i}.router.logits', or 'router.indices' and 'router.scores' of the chosen"
    ),
    "blocks.{i}.hook_attn_in": "take 'layers.{i}.resid_pre', before the norm",
    "blocks.{i}.hook_mlp_in": "take 'layers.{i}.resid_mid', before the norm",
    "blocks.{i}.ln1.hook_normalized": "take 'layers.{i}.resid_pre', before the norm",
    "blocks.{i}.ln1.hook_scale": "take 'layers.{i}.resid_pre', whose root mean square it is",
    "blocks.{i}.ln2.hook_normalized": "take 'layers.{i}.resid_mid', before the norm",
    "blocks.{i}.ln2.hook_scale": "take 'layers.{i}.resid_mid', whose root mean square it is",
    "ln_final.hook_scale": "take the last 'resid_post', whose root mean square it is",
}


def match(config: Llama4Config, names: str | Iterable[str]) -> list[str]:
    """Return the points that the names and patterns stand for, in the order of a forward pass."""
    return list(dict.fromkeys(resolve(config, names).values()))


def resolve(config: Llama4Config, names: str | Iterable[str]) -> dict[str, str]:
    """Return each single name that was meant with its point, in the order of a forward pass.

    The names are those of points where points were asked for, and aliases where aliases were.

    Raises:
        KeyError: a name or pattern that no point has, with the closest one.
        TypeError: a name that is no text.
    """
    known = points(config)
    asked: dict[str, str] = {}
    given = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if strange := [name for name in given if not isinstance(name, str)]:
        raise TypeError(f"{strange[0]!r} names no point: give names or patterns as text")
    for name in given:
        own = [name] if name in known else [point for point in known if fnmatchcase(point, name)]
        found = {point: point for point in own}
        if not found:
            theirs = aliases(known)
            found = {alias: theirs[alias] for alias in theirs if fnmatchcase(alias, name)}
            if reason := _refusal(name, found, known):
                raise KeyError(reason)
            if not found:
                raise KeyError(_unknown(config, name, known, theirs))
        asked |= found
    order = {point: place for place, point in enumerate(known)}
    return dict(sorted(asked.items(), key=lambda item: order[item[1]]))


def aliases(known: Collection[str]) -> dict[str, str]:
    """Return every alias of the known points, with its point.

    >>> aliases(["embed", "layers.7.attn.z"])
    {'hook_embed': 'embed', 'embed.hook_out': 'embed', 'blocks.7.attn.hook_z': 'layers.7.attn.z'}
    """
    layers = _layers(known)
    return {
        alias.hook.format(i=i): point
        for alias in ALIASES
        for i in (layers if "{i}" in alias.hook else [""])
        if (point := alias.point.format(i=i)) in known
    }


def _translated(name: str) -> str:
    """Return the point that an alias means, on any model; another name as it is."""
    layer = re.match(r"blocks\.(\d+)\.", name)
    for alias in ALIASES:
        if alias.hook == _template(name):
            return alias.point.format(i=layer and layer[1])
    return name


def _refusal(pattern: str, found: Collection[str], known: Collection[str]) -> str | None:
    """Say why the hook that a pattern names has no point, and what to take; None if it has.

    A pattern that found other hooks leaves those without a point out instead.
    """
    templates = {_template(name) for name in found}
    layers = _layers(known)
    for hook, advice in WITHOUT_POINT.items():
        meant = _meant(pattern, hook, layers if "{i}" in hook else [""])
        if meant and not templates:
            return f"{pattern!r} has no point here: {_fill(advice, meant)}"
    for hook, advice in ON_MOE.items():
        routed = [i for i in layers if f"layers.{i}.router.logits" in known]
        meant = _meant(pattern, hook, routed)
        if meant and templates <= {hook}:
            some = f"MoE layer {meant[0]} has" if len(meant) == 1 else "MoE layers have"
            dense = ", ".join(name.split(".")[1] for name in found)
            rest = f"; dense layers are {dense}" if dense else ""
            return f"{pattern!r}: {some} no single point for it: {_fill(advice, meant)}{rest}"
    return None


def _unknown(
    config: Llama4Config, name: str, known: Collection[str], theirs: Collection[str]
) -> str:
    point = _translated(name)
    parts = re.fullmatch(r"(?:layers|blocks)\.(\d+)\.(.+)", point)
    if parts:
        layer = int(parts[1])
        if layer >= config.num_hidden_layers:
            last = config.num_hidden_layers - 1
            return f"{name!r}: this model has {config.num_hidden_layers} layers (0 to {last})"
        kinds = {"router": True, "experts": True, "shared": True, "mlp": False}
        asks_moe = kinds.get(parts[2].split(".")[0]) if parts[0].startswith("layers") else None
        if asks_moe is not None and asks_moe != config.is_moe(layer):
            others = [
                str(i) for i in range(config.num_hidden_layers) if config.is_moe(i) == asks_moe
            ]
            kind, other = ("dense", "MoE") if asks_moe else ("MoE", "dense")
            listed = ", ".join(others) or "none"
            return f"{name!r}: layer {layer} is a {kind} layer; {other} layers are {listed}"
    if point.startswith(PICTURE) and config.vision_config is None:
        return f"{name!r}: this model has no vision encoder"
    close = difflib.get_close_matches(name, theirs if "hook_" in name else known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown point {name!r}: {hint}points(config) lists all"


def _layers(known: Collection[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[1] for name in known if name.startswith("layers.")))


def _template(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)


def _meant(pattern: str, hook: str, layers: list[str]) -> list[str]:
    return [i for i in layers if fnmatchcase(hook.format(i=i), pattern)]


def _fill(advice: str, layers: list[str]) -> str:
    return advice.format(i=layers[0]) if len(layers) == 1 and layers[0] else advice
