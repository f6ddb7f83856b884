"""What ``llama4-lab trace`` does: a prompt is run, its experts are told, its values are written."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.edits import Edit, edited
from llama4_lab.edits.base import CLEAN
from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt
from llama4_lab.trace import inputs_of, trace

_WIDEST = 18  # characters of a token
_WORDS = 5  # that may follow


@torch.inference_mode()
def report(
    model: Llama4,
    prompt: Prompt,
    edits: Sequence[Edit] = (),
    names: Collection[str] = (),
    folder: Path | None = None,
) -> str:
    """Run a prompt and return a table of its tokens' experts, and the words that may follow.

    With `edits` the table is the edited run's, and a star marks what the clean one chose otherwise.
    The named values of that run are written to `folder`.

    Raises:
        FileExistsError, KeyError, ValueError: as `trace` and `edited`.
    """
    last = _run(model, prompt, edits, names, folder)
    runs = {"clean": _run(model, prompt), "edited": last} if edits else {"clean": last}
    shares = {name: run.logits.float().softmax(dim=0) for name, run in runs.items()}
    lines = experts_table(prompt.tokens, runs["clean"].experts, last.experts)
    for name, share in shares.items():
        top = share.topk(min(_WORDS, len(share)))
        words = [_quoted(model.tokenizer.token_text(idx)) for idx in top.indices.tolist()]
        said = (f"{word} {p:.1%}" for word, p in zip(words, top.values.tolist(), strict=True))
        lines.append(f"next, {name}: {', '.join(said)}" if edits else f"next: {', '.join(said)}")
    return "\n".join(lines)


def experts_table(
    tokens: Sequence[str],
    clean: Mapping[int, Int[Tensor, "t topk"]],
    shown: Mapping[int, Int[Tensor, "t topk"]],
) -> list[str]:
    """Return a line for each token with its experts in each layer, strongest first.

    A star marks tokens that choose other experts in `shown` than in `clean`, in any order.
    """
    columns = [
        ["token, layer:", *(f"{place} {_quoted(text)}" for place, text in enumerate(tokens))]
    ]
    for layer, chosen in shown.items():
        pairs = zip(chosen.tolist(), clean[layer].tolist(), strict=True)
        cells = [",".join(map(str, new)) + "*" * (set(new) != set(old)) for new, old in pairs]
        columns.append([str(layer), *cells])
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Run:
    experts: dict[int, Int[Tensor, "t topk"]]  # by MoE layer
    logits: Float[Tensor, " v"]  # behind the last token


def _run(
    model: Llama4,
    prompt: Prompt,
    edits: Sequence[Edit] = (),
    names: Collection[str] = (),
    folder: Path | None = None,
) -> _Run:
    inputs = inputs_of(model, prompt)
    chosen = {f"layers.{i}.router.indices": i for i in model.config.routed_layers}
    with (
        edited(model, edits, {CLEAN: inputs}),
        trace(model, chosen) as cache,
        trace(model, names, spill=folder),
    ):
        # All tokens' logits take memory, and only one's are told.
        logits = model(**inputs, keep_last=None if "logits" in names else 1)
    return _Run({i: cache[name][0] for name, i in chosen.items()}, logits[0, -1])


def _quoted(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _WIDEST else f"{shown[: _WIDEST - 2]}…{shown[-1]}"
