"""Turn the files of a package into documents: each extractor maps bytes to lists of paragraphs."""

import bz2
import gzip
import json
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser

from llama4_lab.train.language import tidy

Documents = Iterator[list[str]]


def plain_text(raw: bytes) -> Documents:
    """One document whose paragraphs are parted by blank lines; lines inside them are joined."""
    yield [tidy(block) for block in re.split(r"\n\s*\n", raw.decode("utf-8", "replace"))]


def source_code(raw: bytes) -> Documents:
    """One document with the text as it is, less trailing space; tables of data give nothing."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return
    text = "\n".join(line.rstrip() for line in text.replace("\f", "").splitlines()).strip("\n")
    if sum(map(str.isalpha, text)) > 0.5 * len("".join(text.split())):
        yield [text]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


class _Prose(HTMLParser):
    """Collect the text between block tags; what stands inside a skipped element is dropped."""

    INLINE = _names(
        """a abbr acronym b bdi big cite code dfn em font i kbd label mark q s samp small span
        strong sub sup tt u var app cmd file gui guiseq input key keyseq link sys output"""
    )
    SKIPPED = _names("head script style pre screen nav footer aside info mal:credit svg math")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._pieces: list[str] = []
        self._skipping: str | None = None
        self._depth = 0

    def handle_starttag(self, tag, attrs):
        if self._skipping:
            self._depth += tag == self._skipping
        elif tag in self.SKIPPED:
            self._break()
            self._skipping, self._depth = tag, 1
        elif ("class", "MAC") in attrs:  # LibreOffice writes the keys of both systems
            self._skipping, self._depth = tag, 1
        elif tag not in self.INLINE:
            self._break()

    def handle_endtag(self, tag):
        if self._skipping:
            self._depth -= tag == self._skipping
            if not self._depth:
                self._skipping = None
        elif tag not in self.INLINE:
            self._break()

    def handle_startendtag(self, tag, attrs):
        if not self._skipping and tag not in self.INLINE:
            self._break()

    def handle_data(self, data):
        if not self._skipping:
            self._pieces.append(data)

    def close(self):
        super().close()
        self._break()

    def _break(self):
        paragraph = tidy("".join(self._pieces))
        if paragraph:
            self.paragraphs.append(paragraph)
        self._pieces.clear()


def markup(raw: bytes) -> Documents:
    """One document from HTML or from the XML of help pages, without code blocks and navigation."""
    parser = _Prose()
    parser.feed(raw.decode("utf-8", "replace"))
    parser.close()
    yield parser.paragraphs


_GLYPHS = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "em": "—", "en": "–",
    "hy": "-", "co": "©", "bu": "•", "Fo": "«", "Fc": "»", "fo": "‹", "fc": "›", "->": "→",
    "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "at": "@", "sh": "#", "mu": "×", ">=": "≥",
    "<=": "≤", "+-": "±", "de": "°", "ss": "ß", ":a": "ä", ":o": "ö", ":u": "ü", "'e": "é",
    "Bq": "„", "bq": "‚", "mc": "µ",
}  # fmt: skip
_ROFF_ESCAPE = re.compile(
    r"\\(?:f(?:\[[^]]*\]|\(..|.)|s[-+]?\d+|[mM]\[[^]]*\]|\*(?:\(..|\[[^]]*\]|.)"
    r"|\((?P<two>..)|\[(?P<long>[^]]*)\]|(?P<one>.))"
)
_FONTS = _names("B I BR RB BI IB IR RI SM SB R")
_BLOCKS = {"nf": "fi", "EX": "EE", "TS": "TE", "SY": "YS", "de": ".", "ig": "."}


def _plain(line: str) -> str:
    def glyph(match: re.Match) -> str:
        if name := match["two"] or match["long"]:
            return _GLYPHS.get(name, "")
        return {"-": "-", "e": "\\", " ": " ", "~": " ", "0": " "}.get(match["one"] or "", "")

    return _ROFF_ESCAPE.sub(glyph, line.split('\\"')[0])


def man_page(raw: bytes) -> Documents:
    """One document from a (gzipped) manual page in the `man` macros.

    Headings, tables, literal blocks and the tags of option lists are left out. Pages in the `mdoc`
    macros, which hide their sentences in calls, give nothing.
    """
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8", "replace")
    paragraphs, lines, until, tag_follows = [], [], None, False

    def finish():
        paragraphs.append(tidy(" ".join(lines)))
        lines.clear()

    for line in text.splitlines():
        macro = re.match(r"[.']\s*([^\s\\]*)", line)
        if until:
            if until in line if until == "\\}" else macro and macro[1] == until:
                until = None
        elif not macro:
            lines.append(_plain(line))
            if tag_follows or not line.strip():
                finish()
            tag_follows = False
        elif macro[1] == "Dd":
            return
        elif macro[1] in _FONTS:
            arguments = re.findall(r'"([^"]*)"|(\S+)', line[macro.end() :])
            joint = " " if len(macro[1]) == 1 else ""
            lines.append(_plain(joint.join(quoted or bare for quoted, bare in arguments)))
            if tag_follows:
                finish()
            tag_follows = False
        elif not line.startswith(('.\\"', "'\\\"")):
            finish()
            tag_follows = macro[1] in ("TP", "TQ")
            until = "\\}" if "\\{" in line else _BLOCKS.get(macro[1])
    finish()
    yield [paragraph for paragraph in paragraphs if paragraph]


def r_novels(raw: bytes) -> Documents:
    """The chapters in an R lazy-load database (`.rdb`) of character vectors, one line an element.

    Format: records of a 4-byte big-endian length and compressed XDR data (R Internals 1.8).
    """
    for record in _rdb_records(raw):
        lines = _r_strings(record)
        if len(lines) < 100:
            continue
        text = "\n".join(lines).replace("_", "")
        for chapter in re.split(r"\n(?=(?:CHAPTER|Chapter)\s+[\dIVXL]+)", text):
            yield [tidy(block) for block in re.split(r"\n\s*\n", chapter)]


def _rdb_records(raw: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(raw):
        kind = raw[start + 4 : start + 5]
        if kind in (b"2", b"Z"):
            reader = bz2.BZ2Decompressor() if kind == b"2" else lzma.LZMADecompressor()
            skip = 5
        else:
            reader, skip = zlib.decompressobj(), 4
        data = reader.decompress(raw[start + skip :])
        assert len(data) == struct.unpack(">I", raw[start : start + 4])[0]
        yield data
        start = len(raw) - len(reader.unused_data)


def _r_strings(record: bytes) -> list[str]:
    """The strings of one serialised character vector, or none for anything else."""
    version = struct.unpack(">I", record[2:6])[0]
    start = 14
    if version == 3:
        start += 4 + struct.unpack(">I", record[14:18])[0]
    flags, count = struct.unpack(">II", record[start : start + 8])
    if flags & 0xFF != 16:  # STRSXP
        return []
    start += 8
    strings = []
    for _ in range(count):
        size = max(0, struct.unpack(">i", record[start + 4 : start + 8])[0])  # -1: missing
        strings.append(record[start + 8 : start + 8 + size].decode("utf-8", "replace"))
        start += 8 + size
    return strings


def numbered_verses(raw: bytes) -> Documents:
    """The chapters of a Bible kept as one literal of numbered verses in a Python module."""
    text = raw.decode("utf-8").split('"""')[1].replace("`", "’")
    for chapter in re.split(r"(?<!\S)1\.\s", text):
        verses = (tidy(verse) for verse in re.split(r"(?<!\S)\d+\.\s", chapter))
        yield [" ".join(verse for verse in verses if verse)]


def coloured_poems(raw: bytes) -> Documents:
    """Poems of a fortune file, one document each, without terminal colours and author's line."""
    text = re.sub(r"\x1b\[[\d;]*m", "", raw.decode("utf-8", "replace"))
    for poem in text.split("\n%"):
        lines = [tidy(line) for line in poem.splitlines() if line.strip()]
        if len(lines) > 2:
            title = re.sub(r"题目[:：]|[《》]", "", lines[0])
            yield ["\n".join([title, *lines[2:]])]


def json_lyrics(raw: bytes) -> Documents:
    """Lyrics of a JSON list of `rhythmic` (the tune's name) and `paragraphs`, one document each."""
    for poem in json.loads(raw):
        lines = [tidy(line) for line in poem["paragraphs"]]
        if lines:
            yield ["\n".join([tidy(poem["rhythmic"]), *lines])]
