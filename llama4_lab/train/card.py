"""The model card's figures, measured from the shipped files on the CPU."""

import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, Integer
from torch import Tensor
from tqdm.auto import tqdm

from llama4_lab.analysis.specialisation import (
    Specialisation,
    mutual_information,
    specialisation,
)
from llama4_lab.edits import AttentionTemperature, edited
from llama4_lab.generate import generate
from llama4_lab.model import Llama4
from llama4_lab.model.random import random
from llama4_lab.prompt import Tokenizer
from llama4_lab.train import behaviour, needles

HELD_OUT = Path(__file__).parents[1] / "models" / "held_out"
PROMPTS = {
    "english": "It was a fine morning, and",
    "python": "def read_lines(path):\n",
    "german": "Die Datei wird",
    "french": "Le fichier est",
    "spanish": "El archivo se",
    "russian": "Чтобы открыть файл, нажмите",
    "chinese": "如果要使用此功能，请",
    "arithmetic": "23 + 45 = ",
}


LANGUAGES = ("english", "german", "french", "spanish", "russian", "chinese")
IMAGE_TOKENS = "image tokens"
EDGES = (0, 128, 256, 512, 1024, 2047)  # positions
ROWS = 24  # rows of so many tokens, at most


@dataclass(frozen=True)
class Card:
    """What `measure` found; shares in [0, 1], losses in bits per UTF-8 byte or nats per token."""

    bits_per_byte: dict[str, float]
    tokens: dict[str, int]
    layers: list[int]
    information: dict[str, list[float]]  # grouping -> MI of kind and expert in bits, by MoE layer
    information_untrained: dict[str, list[float]]  # the same of a model with random weights
    fullest: list[float]  # share of the fullest and emptiest expert of the mix, by layer
    emptiest: list[float]
    share: dict[str, list[list[float]]]  # domain -> layer -> expert
    recall: dict[str, dict[str, float]]  # where the code was said -> variant -> right answers
    pictures: dict[str, dict[str, float]]  # task -> right, changed, kept (see `behaviour.seeing`)
    sums: dict[str, float]  # kind -> right answers
    loss_by_position: dict[str, dict[str, float]]  # positions -> variant -> nats a token
    samples: dict[str, str]
    recited: dict[str, float]  # domain -> share of 50-token spans told word for word


def held_out_texts(folder: Path = HELD_OUT) -> dict[str, str]:
    """Read ``{domain}.txt`` (shipped), or ``{domain}.held.txt`` (of a built corpus)."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give that of a built corpus")
    found = sorted(folder.glob("*.held.txt")) or sorted(folder.glob("*.txt"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no held-out texts (*.held.txt or *.txt)")
    return {path.name.split(".")[0]: path.read_text(encoding="utf-8") for path in found}


def training_tokens(folder: Path) -> dict[str, Integer[np.ndarray, " n"]]:
    """Map the token files of a corpus's training texts into memory, leaving out the empty ones."""
    files = [path for path in sorted(folder.glob("*.train.bin")) if path.stat().st_size]
    return {path.name.split(".")[0]: np.memmap(path, np.uint16, "r") for path in files}


def measure(
    model: Llama4,
    texts: dict[str, str],
    *,
    length: int = 512,
    limit: int = 40_000,
    count: int = 100,
    trained_on: Mapping[str, Integer[np.ndarray, " n"]] | None = None,
) -> Card:
    """Measure everything that a card tells.

    Each text is read in windows of `length` tokens, up to `limit` tokens a domain; a window's first
    token is not scored. Texts too short for the losses by position are left out, which is said. The
    untrained control is the same model with random weights (seed 0). `count` questions of each kind
    are asked. `trained_on` are the tokens of training texts, if they are at hand: whether the model
    recites them is then tried in ten times as many places.

    Raises:
        ValueError: all texts are too short.
    """
    texts = long_enough(model.tokenizer, texts)
    rows = {name: windows(model.tokenizer, text, length, limit) for name, text in texts.items()}
    steps = tqdm(total=6, desc="card", leave=False)

    def done(step: str) -> None:
        steps.set_postfix_str(step)
        steps.update()

    bits = {name: bits_per_byte(model, ids) for name, ids in rows.items()}
    done("losses")
    batches: dict[str, list] = {name: list(ids.split(16)) for name, ids in rows.items()}
    sees = model.config.vision_config is not None
    if sees:
        batches[IMAGE_TOKENS] = behaviour.image_tokens(model, count)
    trained = specialisation(model, batches)
    untrained = specialisation(random(model.config, seed=0), batches)
    done("experts")
    prose = texts.get("english") or max(texts.values(), key=len)
    recall = behaviour.recalls(model, hay(model.tokenizer, prose), count)
    done("needles")
    pictures = behaviour.seeing(model, count) if sees else {}
    done("pictures")
    sums = behaviour.reckoning(model, count)
    done("sums")
    positions = losses_by_position(model, [*texts.values()])
    done("positions")
    steps.close()
    return Card(
        bits_per_byte=rounded(bits),
        tokens={name: ids.numel() for name, ids in rows.items()},
        layers=list(trained.layers),
        information=information(trained),
        information_untrained=information(untrained),
        fullest=trained.mixed.max(axis=1).round(3).tolist(),
        emptiest=trained.mixed.min(axis=1).round(3).tolist(),
        share=dict(zip(trained.domains, trained.share.round(3).tolist(), strict=True)),
        recall={where: rounded(row) for where, row in recall.items()},
        pictures={task: rounded(row) for task, row in pictures.items()},
        sums=rounded(sums),
        loss_by_position={where: rounded(row) for where, row in positions.items()},
        samples={
            name: prompt + generate(model, prompt, 60, temperature=0.6, seed=1, progress=False)
            for name, prompt in PROMPTS.items()
            if name in texts
        },
        recited=rounded(
            {
                name: behaviour.recited(model, tokens, 10 * count)
                for name, tokens in (trained_on or {}).items()
            }
        ),
    )


def information(found: Specialisation) -> dict[str, list[float]]:
    """Return the mutual information of expert and kind of text, for each way to tell the kinds."""
    kinds = {name: found.share[i] for i, name in enumerate(found.domains)}
    text = [share for name, share in kinds.items() if name != IMAGE_TOKENS]
    groups = {"domain": [*kinds.values()]}
    if len(languages := [kinds[name] for name in LANGUAGES if name in kinds]) > 1:
        groups["language"] = languages
    if IMAGE_TOKENS in kinds:
        groups["image or text"] = [np.mean(text, axis=0), kinds[IMAGE_TOKENS]]
    return {
        name: [round(mutual_information(share), 3) for share in np.stack(shares, axis=1)]
        for name, shares in groups.items()
    }


def hay(tokenizer: Tokenizer, text: str) -> needles.Fill:
    """Return hay of a text's sentences."""
    ids, stop = tokenizer.encode(text), tokenizer.encode(".")[-1]
    return needles.passages(ids, [i + 1 for i, idx in enumerate(ids) if idx == stop])


def losses_by_position(
    model: Llama4, texts: list[str], limit: int = 40_000
) -> dict[str, dict[str, float]]:
    """Return the loss at ranges of positions, with attention's temperature on and off."""
    rows = torch.cat([windows(model.tokenizer, text, EDGES[-1] + 1, limit) for text in texts])
    config = model.config
    nope = [i for i in range(config.num_hidden_layers) if not config.uses_rope(i)]
    on = behaviour.loss_by_position(model, rows[:ROWS], EDGES)
    with edited(model, [AttentionTemperature(i, 0.0) for i in nope]):
        off = behaviour.loss_by_position(model, rows[:ROWS], EDGES)
    return {
        f"{a + 1} to {b}": {"temperature on": x, "temperature off": y}
        for (a, b), x, y in zip(itertools.pairwise(EDGES), on, off, strict=True)
    }


def rounded(row: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in row.items()}


def long_enough(tokenizer: Tokenizer, texts: dict[str, str]) -> dict[str, str]:
    """Leave out the texts that do not fill a row of `losses_by_position`, and name them."""
    needed = EDGES[-1] + 1
    sizes = {name: len(tokenizer.encode(text)) for name, text in texts.items()}
    short = {name: size for name, size in sizes.items() if size < needed}
    found = ", ".join(f"{name} ({size:,})" for name, size in short.items())
    if len(short) == len(texts):
        raise ValueError(
            f"no held-out text has the {needed:,} tokens that a card needs: {found}; give longer "
            "ones"
        )
    if short:
        tqdm.write(f"left out, with fewer than {needed:,} tokens: {found}", file=sys.stderr)
    return {name: text for name, text in texts.items() if name not in short}


def windows(tokenizer: Tokenizer, text: str, length: int, limit: int) -> Int[Tensor, "rows length"]:
    """Cut a text into rows of `length` tokens; what is left at the end is dropped."""
    ids = tokenizer.encode(text)[:limit]
    length = min(length, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@torch.no_grad()
def bits_per_byte(model: Llama4, rows: Int[Tensor, "rows length"]) -> float:
    """Return the model's loss over all tokens but each row's first, in bits per UTF-8 byte."""
    nats = 0.0
    for ids in rows.split(8):
        logits = model(ids[:, :-1]).float()
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    scored = sum(len(model.tokenizer.token_bytes(idx)) for idx in rows[:, 1:].flatten().tolist())
    return nats / math.log(2) / scored


def markdown(card: Card) -> str:
    """Write a card as tables."""
    losses = {
        name: {"bits per byte": f"{bits:.3f}", "tokens": card.tokens[name]}
        for name, bits in card.bits_per_byte.items()
    }
    experts = {
        str(layer): {
            **{
                heading: f"{found[group][i]:.2f}"
                for group in card.information
                for heading, found in (
                    (f"{group} (bits)", card.information),
                    (f"{group}, untrained", card.information_untrained),
                )
            },
            "fullest expert": f"{card.fullest[i]:.0%}",
            "emptiest": f"{card.emptiest[i]:.0%}",
        }
        for i, layer in enumerate(card.layers)
    }
    best = int(np.argmax(card.information["domain"]))
    shares = {
        name: {f"e{e}": f"{100 * x:.0f}" for e, x in enumerate(layers[best])}
        for name, layers in card.share.items()
    }
    losses_at = {
        where: {name: f"{nats:.3f}" for name, nats in row.items()}
        for where, row in card.loss_by_position.items()
    }
    pictures = [
        "Questions about pictures: right answers; those of them that change when the asked "
        "object is painted out; right answers when another object is painted out:",
        table("question", percent(card.pictures)),
    ]
    parts = [
        table("domain", losses),
        "Mutual information of a token's expert with its domain"
        + f" ({IMAGE_TOKENS} are one)" * (IMAGE_TOKENS in card.share)
        + ", by layer; all domains weigh alike, and untrained is a model with random weights:",
        table("layer", experts),
        f"Share of each domain's tokens by expert, layer {card.layers[best]} (%):",
        table("domain", shares),
        "Codes told rightly, by the distance in tokens at which they had been said (the first row "
        "in the same chunk, the others in another):",
        table("distance", percent(card.recall)),
        *(pictures if card.pictures else ()),
        "Sums told rightly, in a chat, on problems that were not trained:",
        table("kind", percent({kind: {"right": x} for kind, x in card.sums.items()})),
        "Loss by position, in nats a token:",
        table("position", losses_at),
    ]
    if card.recited:
        parts += [
            "Spans of 50 tokens of the training texts that are recited word for word after the 50 "
            "before them:",
            table("domain", {n: {"recited": f"{x:.1%}"} for n, x in card.recited.items()}),
        ]
    parts.append("Samples (the prompt first; temperature 0.6, top-p 0.9, seed 1):")
    for name, text in card.samples.items():
        parts += [f"**{name}**", "```text\n" + text.replace("```", "'''") + "\n```"]
    return "\n\n".join(parts) + "\n"


def percent(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, str]]:
    return {name: {k: f"{x:.0%}" for k, x in row.items()} for name, row in rows.items()}


def table(corner: str, rows: Mapping[str, Mapping[str, object]]) -> str:
    """Write rows of named cells as a Markdown table; a missing cell stays empty."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[corner, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
