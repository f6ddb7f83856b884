"""The model card's figures, measured from the shipped files on the CPU."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from llama4_lab.analysis.specialisation import specialisation
from llama4_lab.generate import generate
from llama4_lab.model import Llama4
from llama4_lab.model.random import random
from llama4_lab.prompt import Tokenizer

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


@dataclass(frozen=True)
class Card:
    """What `measure` found; shares in [0, 1], losses in bits per UTF-8 byte."""

    bits_per_byte: dict[str, float]
    tokens: dict[str, int]
    layers: list[int]
    mutual_information: list[float]  # bits, by MoE layer
    mutual_information_untrained: list[float]  # the same of a router with random weights
    fullest: list[float]  # share of the fullest and emptiest expert of the mix, by layer
    emptiest: list[float]
    share: dict[str, list[list[float]]]  # domain -> layer -> expert
    samples: dict[str, str]


def held_out_texts(folder: Path = HELD_OUT) -> dict[str, str]:
    """Read ``{domain}.txt`` (shipped), or ``{domain}.held.txt`` (of a built corpus)."""
    found = sorted(folder.glob("*.held.txt")) or sorted(folder.glob("*.txt"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no held-out texts (*.held.txt or *.txt)")
    return {path.name.split(".")[0]: path.read_text(encoding="utf-8") for path in found}


def measure(
    model: Llama4, texts: dict[str, str], *, length: int = 512, limit: int = 40_000
) -> Card:
    """Measure losses, specialisation and samples.

    Each text is read in windows of `length` tokens, up to `limit` tokens a domain; a window's first
    token is not scored. The untrained control is the same model with random weights (seed 0).
    """
    rows = {name: windows(model.tokenizer, text, length, limit) for name, text in texts.items()}
    bits = {
        name: bits_per_byte(model, ids)
        for name, ids in tqdm(rows.items(), desc="loss", leave=False)
    }
    batches = {name: ids.split(16) for name, ids in rows.items()}
    trained = specialisation(model, batches)
    untrained = specialisation(random(model.config, seed=0), batches)
    return Card(
        bits_per_byte={name: round(value, 3) for name, value in bits.items()},
        tokens={name: ids.numel() for name, ids in rows.items()},
        layers=list(trained.layers),
        mutual_information=trained.mutual_information.round(3).tolist(),
        mutual_information_untrained=untrained.mutual_information.round(3).tolist(),
        fullest=trained.mixed.max(axis=1).round(3).tolist(),
        emptiest=trained.mixed.min(axis=1).round(3).tolist(),
        share=dict(zip(trained.domains, trained.share.round(3).tolist(), strict=True)),
        samples={
            name: prompt + generate(model, prompt, 60, temperature=0.6, seed=1, progress=False)
            for name, prompt in PROMPTS.items()
            if name in texts
        },
    )


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
    lines = ["| domain | bits per byte | tokens |", "| --- | --- | --- |"]
    lines += [f"| {n} | {b:.3f} | {card.tokens[n]} |" for n, b in card.bits_per_byte.items()]
    lines += [
        "",
        "| layer | mutual information (bits) | untrained router | fullest expert | emptiest |",
        "| --- | --- | --- | --- | --- |",
    ]
    columns = zip(
        card.layers,
        card.mutual_information,
        card.mutual_information_untrained,
        card.fullest,
        card.emptiest,
        strict=True,
    )
    lines += [f"| {i} | {a:.2f} | {b:.2f} | {c:.0%} | {d:.0%} |" for i, a, b, c, d in columns]
    best = max(range(len(card.layers)), key=lambda i: card.mutual_information[i])
    experts = len(next(iter(card.share.values()))[best])
    lines += [
        "",
        f"Share of each domain's tokens by expert, layer {card.layers[best]} (%):",
        "",
        "| domain | " + " | ".join(f"e{e}" for e in range(experts)) + " |",
        "| --- " * (experts + 1) + "|",
    ]
    for name, layers in card.share.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * s:.0f}" for s in layers[best]) + " |")
    lines += ["", "Samples (the prompt first; temperature 0.6, top-p 0.9, seed 1):", ""]
    for name, text in card.samples.items():
        lines += [f"**{name}**", "", "```text", text.replace("```", "'''"), "```", ""]
    return "\n".join(lines)
