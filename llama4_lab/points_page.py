"""The page of the documentation that lists every point: ``llama4-lab points --markdown``."""

import re
from collections.abc import Iterable

from llama4_lab.aliases import ALIASES, ON_MOE, WITHOUT_POINT
from llama4_lab.config import Llama4Config
from llama4_lab.points import PICTURE, described

_PAGE = """\
# Points

Every named value of a model, its axes and its meaning. `l4.points(model.config)` lists them for a
model; `l4.trace` watches and `l4.intervene` changes any of them, by name or pattern
(`layers.*.router.logits`). This page is written by `llama4-lab points --markdown`, for a model of
{layers} layers: {dense} dense, {moe} MoE.

Letters: b batch, t query position, s key position (the last t of them are the queries' own), d
model width, h query heads, k key/value heads, dh head width, e experts, topk chosen experts, f
expert or MLP width, v vocabulary. In the vision encoder b counts tiles, t and s are patch slots
(the class token last), and p are the image tokens of a tile.

Watching or changing `attn.scores` or `attn.pattern` makes that layer attend explicitly, which takes
memory for b·h·t·s numbers and equals the usual path to rounding. Everything else leaves a prompt's
logits the same to the bit while it is only watched, or changed into what it was; a token that is
decoded on the CPU is rounded otherwise where more than routers are watched. Changing `experts.*`
makes that layer run its experts the readable way.

{text}
{vision}## TransformerLens

`trace`, `intervene` and `run_with_cache` take TransformerLens's names wherever they take ours, also
as patterns; a pattern stands for our points, and for aliases only if none of ours fits. What is
asked by an alias is kept under the alias.

{aliases}
These hooks have no point of their own. Asking for one says what to take instead.

{refused}"""


def as_markdown(config: Llama4Config) -> str:
    """Return the page of the documentation that lists the points of a model."""
    kinds: dict[str, list[int]] = {}  # kind of point -> its layers
    for name in (known := described(config)):
        kind = re.sub(r"\d+", "{i}", name)
        if name.endswith("resid_post"):  # comes behind both kinds of feed-forward
            kinds[kind] = kinds.pop(kind, [])
        kinds.setdefault(kind, []).extend(int(digits) for digits in re.findall(r"\d+", name))

    def table(names: Iterable[str]) -> str:
        lines = []
        for kind in names:
            point = known[kind.format(i=next(iter(kinds[kind]), ""))]
            hooks = ", ".join(f"`{alias.hook}`" for alias in ALIASES if alias.point == kind)
            lines.append(
                (f"`{kind}`", point.axes, _which(config, kind, kinds[kind]), point.meaning, hooks)
            )
        return _table(("point", "axes", "layers", "meaning", "TransformerLens"), lines)

    seen = [kind for kind in kinds if kind.startswith(PICTURE)]
    vision = f"## Vision encoder\n\n{table(seen)}\n" if seen else ""
    differing = [(f"`{a.hook}`", f"`{a.point}`", a.difference) for a in ALIASES if a.difference]
    refused = [(f"`{hook}`", advice) for hook, advice in WITHOUT_POINT.items()]
    refused += [(f"`{hook}` on MoE layers", advice) for hook, advice in ON_MOE.items()]
    moe = sum(map(config.is_moe, range(config.num_hidden_layers)))
    return _PAGE.format(
        layers=config.num_hidden_layers,
        dense=config.num_hidden_layers - moe,
        moe=moe,
        text=f"## Text decoder\n\n{table(kind for kind in kinds if kind not in seen)}",
        vision=vision,
        aliases=_table(("alias", "point", "where it differs"), differing),
        refused=_table(("hook", "instead"), refused),
    )


def _which(config: Llama4Config, kind: str, layers: list[int]) -> str:
    if not layers:
        return "–"
    if kind.startswith("vision.") or len(layers) == config.num_hidden_layers:
        return "all"
    return "MoE" if config.is_moe(layers[0]) else "dense"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
