"""The corpus: extractors, the language filter, fetching and the split, all offline."""

import bz2
import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from tokenizers import Tokenizer

from llama4_lab.train import corpus, dataset, extract, fetch
from llama4_lab.train.language import is_prose, tidy
from llama4_lab.train.sources import DOMAINS, SOURCES, Source
from llama4_lab.train.tokenizer import train_tokenizer

PROSE = {
    "german": "Der Hund schläft unter dem Tisch, und die Katze sieht ihm von der Bank aus zu.",
    "french": "Le chien dort sous la table et le chat le regarde depuis le banc de la cuisine.",
    "spanish": "El perro duerme debajo de la mesa y el gato lo mira desde el banco de la cocina.",
    "russian": "Собака спит под столом, а кошка смотрит на неё со скамьи у самого окна кухни.",
    "chinese": "狗在桌子下面睡觉，猫坐在厨房窗边的长椅上静静地看着它。",
}
ENGLISH = "The dog sleeps under the table and the cat is watching it from a bench in the kitchen."


def one(documents) -> list[str]:
    (paragraphs,) = documents
    return paragraphs


# Extractors


def test_a_manual_page_gives_its_sentences_without_headings_tags_tables_and_fonts():
    page = r""".\" a comment
.TH CAT 1 "1 May" "tools \- one"
.SH NAME
cat \- join files
.if \n(.g \{\
hidden words
.\}
.SH DESCRIPTION
Joins \fBall\fP files \(lqin order\(rq to
.I standard output .
.PP
A second one.
.TP
\fB\-n\fP
Numbers the lines.
.nf
cat a b
.fi
.TS
a table
.TE
The end.
"""
    paragraphs = one(extract.man_page(gzip.compress(page.encode())))
    assert paragraphs == [
        "cat - join files",
        "Joins all files “in order” to standard output .",
        "A second one.",
        "-n",
        "Numbers the lines.",
        "The end.",
    ]


def test_a_manual_page_of_the_other_macro_set_gives_nothing():
    assert list(extract.man_page(b".Dd May 1\n.Nm cat\nSome words.\n")) == []


def test_markup_is_cut_at_blocks_and_loses_code_navigation_and_the_other_systems_keys():
    page = """<html><head><title>no</title></head><body><nav><p>no</p></nav>
    <p>Press <b><span class="MAC">Command</span><span>Ctrl</span></b>+A &amp; wait,
    then go on.</p>
    <pre>a = <b>1</b></pre><ul><li>first<li>second</ul><br/>last</body></html>"""
    paragraphs = one(extract.markup(page.encode()))
    assert paragraphs == ["Press Ctrl+A & wait, then go on.", "first", "second", "last"]


def test_a_help_page_in_xml_loses_its_credits():
    page = b"<page><info><desc>no</desc><credit><name>no</name></credit></info><p>Yes.</p></page>"
    assert one(extract.markup(page)) == ["Yes."]


def test_lines_of_plain_text_are_joined_into_paragraphs():
    assert one(extract.plain_text(b"one\ntwo\n\n  three\n")) == ["one two", "three"]


def test_source_code_keeps_its_layout_and_data_tables_are_left_out():
    assert one(extract.source_code(b"\ndef f():  \n    return 1\n\n")) == ["def f():\n    return 1"]
    assert list(extract.source_code(b"x = (1, 2, 3, 4, 5, 6)\n")) == []
    assert list(extract.source_code(b"name = '\xff'\n")) == []


def strings(values: list[str], version: int) -> bytes:
    """Serialise an R character vector (XDR, version 2 or 3)."""
    head = b"X\n" + struct.pack(">III", version, 0x40203, 0x20300)
    if version == 3:
        head += struct.pack(">I", 5) + b"UTF-8"
    items = (struct.pack(">II", 0x40009, len(v.encode())) + v.encode() for v in values)
    return head + struct.pack(">II", 16, len(values)) + b"".join(items)


def test_chapters_are_read_from_an_r_database_in_either_compression():
    novel = ["A NOVEL", "", "CHAPTER I", "", "It was _very_", "late.", "", "CHAPTER II", "", "é"]
    data = strings(novel + [""] * 100, 2)
    more = strings(novel + [""] * 100, 3)
    other = b"X\n" + struct.pack(">III", 2, 0, 0) + struct.pack(">II", 13, 1) + bytes(4)
    records = b"".join(
        struct.pack(">I", len(plain)) + packed
        for plain, packed in (
            (data, zlib.compress(data)),
            (other, zlib.compress(other)),
            (more, b"2" + bz2.compress(more)),
        )
    )
    chapters = [[p for p in chapter if p] for chapter in extract.r_novels(records)]
    assert chapters == 2 * [
        ["A NOVEL"],
        ["CHAPTER I", "It was very late."],
        ["CHAPTER II", "é"],
    ]


def test_verses_lose_their_numbers_and_chapters_become_documents():
    module = 'bible = Bible(\n    """1. One came. 2. Two`s went. 1. Next 7 days.""",\n{1: (2, 3)})'
    chapters = [text for (text,) in extract.numbered_verses(module.encode())]
    assert chapters == ["", "One came. Two’s went.", "Next 7 days."]


def test_poems_lose_colours_and_author():
    poems = "\x1b[32m《夜》\x1b[m\n\x1b[33m作者：某\x1b[m\n月在天。\n风在树。\n%\n"
    assert list(extract.coloured_poems(poems.encode())) == [["夜\n月在天。\n风在树。"]]
    lyrics = [{"author": "某", "rhythmic": "夜曲", "paragraphs": ["月在天。"]}]
    lyrics.append({"author": "某", "rhythmic": "空", "paragraphs": []})
    assert list(extract.json_lyrics(json.dumps(lyrics).encode())) == [["夜曲\n月在天。"]]


# Language


@pytest.mark.parametrize("language", PROSE)
def test_each_language_is_told_from_english_and_from_other_scripts(language):
    assert is_prose(PROSE[language], language)
    others = {"english", "german", "russian", "chinese"} - {language}
    texts = PROSE | {"english": ENGLISH}
    assert not any(is_prose(texts[other], language) for other in others)


def test_a_foreign_word_or_two_is_no_debris_but_half_a_paragraph_is():
    assert is_prose("Команда Enter открывает окно. " + PROSE["russian"], "russian")
    assert not is_prose(PROSE["chinese"] + ENGLISH, "chinese")
    assert not is_prose(PROSE["german"] + " " + ENGLISH, "german")


@pytest.mark.parametrize(
    "text",
    [
        "Kurz und gut, das ist es.",
        PROSE["german"] + " Mehr steht auf https://example.org und bei den anderen Seiten.",
        PROSE["german"] + " Schreiben Sie an hund@example.org, wenn das nicht so ist.",
        "Copyright 2020 bei dem Hund und der Katze, die auf der Bank in der Küche liegt.",
        "-a -b -c --lang=de | [der|die|das] und {1..9} // 0x00 0x01 == != <= >= ++ -- 123 456 789",
        PROSE["german"] + r" Das ist \fBfett\fP und das ist es nicht.",
        "Siehe den Abschnitt , der die Katze und den Hund auf der Bank in der Küche zeigt.",
    ],
)
def test_short_notes_addresses_licences_tables_and_markup_are_refused(text):
    assert not is_prose(text, "german")


def test_a_language_without_a_filter_is_named_with_the_possible_ones():
    with pytest.raises(ValueError, match=r"no filter for 'dutch': choose one of german, french, "):
        is_prose(ENGLISH, "dutch")


def test_tidying_composes_accents_and_drops_what_is_invisible():
    assert tidy(" e\u0301\u00a0x\u00ad\u200by¶\n z ") == "é xy z"


# Fetching


def source(
    registry="pypi", package="small-text", domain="german", megabytes=1.0, is_free=False
) -> Source:
    text = (r"\.txt$", extract.plain_text)
    return Source(domain, registry, package, "1.0", "MIT", *text, megabytes, is_free)


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """A search path that holds only the scripts written through the returned function."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def test_a_release_with_another_version_gives_its_own(tmp_path, clients):
    clients("apt-get", '[ "$2" = small-text ] && echo > small-text_2%3a2.0-1_all.deb')
    path = fetch.fetch(source("debian"), tmp_path / "downloads")
    assert path == tmp_path / "downloads" / "small-text_2%3a2.0-1_all.deb"
    assert fetch.version_of(source("debian"), path) == "2:2.0-1"
    clients("apt-get", "exit 1")  # not asked again
    assert fetch.fetch(source("debian"), tmp_path / "downloads") == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_scoped_package_is_found_under_the_name_that_npm_gives_it(tmp_path, clients):
    clients("npm", "echo > owner-data-1.0.tgz")
    path = fetch.fetch(source("npm", "@owner/data"), tmp_path)
    assert path.name == "owner-data-1.0.tgz"


def test_a_missing_client_and_a_failing_one_are_told_in_a_sentence(tmp_path, clients):
    with pytest.raises(fetch.SourceMissing) as missing:
        fetch.fetch(source("npm", "words"), tmp_path)
    assert str(missing.value) == (
        "words 1.0 needs npm, which is not installed: install it, or leave this source out with "
        "--allow-missing"
    )
    clients("apt-get", "echo 'E: Unable to locate package words' >&2; exit 100")
    with pytest.raises(fetch.SourceMissing) as missing:
        fetch.fetch(source("debian", "words"), tmp_path)
    assert str(missing.value) == (
        "words 1.0 could not be fetched from debian (E: Unable to locate package words): run "
        "'apt-get update' and try again, or leave this source out with --allow-missing"
    )


def test_a_client_may_fail_in_words_that_are_no_utf8(tmp_path, clients):
    clients("npm", r"printf 'n\351ant\n' >&2; exit 1")
    with pytest.raises(fetch.SourceMissing, match=r"could not be fetched from npm \(n�ant\): try"):
        fetch.fetch(source("npm", "words"), tmp_path)


def tar(path, files: dict[str, bytes], mode: str):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        archive.addfile(link)


def test_folders_wheels_and_archives_are_read_alike(tmp_path, clients):
    files = {"a.txt": b"one", "b/c.txt": b"two", "b/d.png": b"three"}
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    tar(tmp_path / "p.tgz", files, "w:gz")
    tar(tmp_path / "p.deb", files, "w")
    clients("dpkg-deb", '[ "$1" = --fsys-tarfile ] && exec /bin/cat "$2"')
    wanted = [("a.txt", b"one"), ("b/c.txt", b"two")]
    for name in ("p.whl", "p.tgz", "p.deb"):
        assert list(fetch.members(tmp_path / name, r"\.txt$")) == wanted
    (tmp_path / "lib" / "site-packages").mkdir(parents=True)
    (tmp_path / "lib" / "b.py").write_bytes(b"one")
    (tmp_path / "lib" / "site-packages" / "c.py").write_bytes(b"two")
    (library,) = (s for s in SOURCES if s.domain == "python")
    assert list(fetch.members(tmp_path / "lib", library.members)) == [("b.py", b"one")]


@pytest.mark.parametrize("name", ["p.whl", "p.tgz", "p.deb"])
def test_a_damaged_package_is_named(tmp_path, clients, name):
    (tmp_path / name).write_bytes(b"no archive")
    clients("dpkg-deb", "exit 2")
    with pytest.raises(fetch.SourceMissing, match=rf"{name} cannot be read \(.*\): delete it and"):
        list(fetch.members(tmp_path / name, ""))


def test_a_machine_without_dpkg_is_told_so(tmp_path, clients):
    (tmp_path / "p.deb").touch()
    with pytest.raises(fetch.SourceMissing, match=r"p\.deb needs dpkg-deb, which is not installed"):
        list(fetch.members(tmp_path / "p.deb", ""))


# Building


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """A table of two German sources at hand and a Spanish one that nothing can fetch."""
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    sentence = "Das ist der Satz des Hundes {} und nicht der Katze, die auf der Bank {} liegt."
    animals = [chr(97 + i) + chr(97 + j) for i in range(20) for j in range(20)]
    for package in ("first", "second"):
        with zipfile.ZipFile(downloads / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
            for animal in animals:
                text = [sentence.format(animal, package), ENGLISH, PROSE["german"]]
                wheel.writestr(f"{animal}.txt", "\n\n".join(text))
    rows = (
        source(package="first", is_free=True),
        source(package="second"),
        source("debian", "third", domain="spanish"),
    )
    monkeypatch.setattr(corpus, "SOURCES", rows)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return tmp_path


def documents(folder, part: str) -> list[str]:
    return corpus.read_documents(folder / f"german.{part}.txt")


def test_documents_are_split_once_and_for_all_and_lose_foreign_and_repeated_text(small_world):
    report = corpus.build(small_world, domains=["german"])
    train, held = documents(small_world, "train"), documents(small_world, "held")
    assert report["domains"]["german"] | {"train_bytes": 0, "held_bytes": 0} == {
        "train_documents": len(train),
        "held_documents": len(held),
        "train_bytes": 0,
        "held_bytes": 0,
    }
    assert len(train) + len(held) == 800
    assert 0.02 < len(held) / 800 < 0.06
    text = "".join(train + held)
    assert text.count(PROSE["german"]) == 1
    assert ENGLISH not in text
    assert not set(train) & set(held)
    before = {file.name: file.read_bytes() for file in small_world.glob("*.*")}
    corpus.build(small_world, domains=["german"])
    assert {file.name: file.read_bytes() for file in small_world.glob("*.*")} == before
    # A document keeps its side when other documents come or go.
    corpus.build(small_world, licence="strict", domains=["german"])
    assert {text for text in held if "first" in text} == set(documents(small_world, "held"))


def test_paragraphs_that_differ_in_digits_alone_count_as_repeated():
    files = [
        (name, f"{PROSE['german']} Das war {name}.\n\n{name}".encode()) for name in ("17", "18")
    ]
    texts = [each.text for each in corpus.clean(files, source(domain="english"), set())]
    assert texts == [f"{PROSE['german']} Das war 17.\n\n17", "18"]


def test_a_cap_takes_the_same_documents_wherever_they_stand():
    many = [corpus.Document(str(i), "x" * 1000) for i in range(50)]
    kept = corpus.cap(many, 0.01)
    assert len(kept) == 10
    assert corpus.cap(reversed(many), 0.01) == kept
    assert kept != many[:10]


def test_the_report_names_licences_bytes_and_what_is_missing(small_world):
    report = corpus.build(small_world, domains=["german", "spanish"], allow_missing=True)
    assert report == json.loads((small_world / "sources.json").read_text())
    first, second = report["sources"]
    assert first == {
        "domain": "german",
        "registry": "pypi",
        "package": "first",
        "version": "1.0",
        "licence": "MIT",
        "documents": 400,
        "bytes": sum(
            len(text.encode())
            for part in ("train", "held")
            for text in documents(small_world, part)
            if "first" in text
        ),
    }
    assert second["package"] == "second"
    assert (small_world / "spanish.train.txt").read_bytes() == b""
    lines = corpus.summary(report).splitlines()
    assert lines[1] == "spanish  is empty: none of its sources was asked for and at hand"
    assert lines[2].startswith("left out: third 1.0 needs apt-get, which is not installed:")


def test_a_missing_source_stops_the_build_unless_it_may_be_left_out(small_world):
    with pytest.raises(fetch.SourceMissing, match=r"^third 1\.0 needs apt-get"):
        corpus.build(small_world, domains=["spanish"])
    report = corpus.build(small_world, domains=["spanish"], allow_missing=True)
    assert corpus.summary(report).startswith("spanish  is empty")


def test_arithmetic_is_written_with_its_test_problems_held_out(tmp_path):
    corpus.write_arithmetic(tmp_path, documents=40)
    train, held = (
        corpus.read_documents(tmp_path / f"arithmetic.{p}.txt") for p in ("train", "held")
    )
    assert (len(train), len(held)) == (40, 2)
    problems = [set("".join(texts).splitlines()) for texts in (train, held)]
    assert len(problems[1]) > 20
    assert not problems[0] & problems[1]


def test_unknown_domains_and_licences_are_named_with_the_possible_ones(tmp_path):
    with pytest.raises(ValueError, match=r"unknown domain 'dutch': choose among english, python, "):
        corpus.build(tmp_path, domains=["german", "dutch"])
    with pytest.raises(ValueError, match=r"licence 'mine' is unknown: choose 'all' or 'strict'"):
        corpus.build(tmp_path, licence="mine")


def test_the_table_has_every_domain_and_english_and_python_are_free():
    assert DOMAINS == ("english", "python", "german", "french", "spanish", "russian", "chinese")
    assert all(row.is_free for row in SOURCES if row.domain in ("english", "python"))
    assert not any("GPL" in row.licence.split("(")[0] for row in SOURCES if row.is_free)


# Encoding


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*PROSE.values(), ENGLISH] * 3, vocab_size=400)


def test_encoded_documents_end_with_their_token_and_are_counted(tmp_path, tokenizer):
    texts = [PROSE["russian"], "<|end_of_text|> is only text", "猫"]
    (tmp_path / "x.train.txt").write_text(corpus.SEPARATOR.join(texts), encoding="utf-8")
    (tmp_path / "x.held.txt").touch()
    meta = dataset.encode(tmp_path, tokenizer)
    assert meta == json.loads((tmp_path / "meta.json").read_text())
    ids = np.fromfile(tmp_path / "x.train.bin", dtype="<u2")
    end = tokenizer.token_to_id("<|end_of_text|>")
    assert meta["end_of_text"] == end
    assert meta["files"]["x.train"] == {
        "tokens": len(ids),
        "bytes": sum(len(text.encode()) for text in texts),
        "documents": 3,
    }
    assert meta["files"]["x.held"] == {"tokens": 0, "bytes": 0, "documents": 0}
    stops = np.flatnonzero(ids == end)
    assert len(stops) == 3
    assert stops[-1] == len(ids) - 1
    decoded = [tokenizer.decode(part[part != end].tolist()) for part in np.split(ids, stops)]
    assert decoded == [*texts, ""]
    assert not tokenizer.encode_special_tokens  # the caller's tokenizer is left as it was


def test_encoding_needs_a_corpus_and_a_small_vocabulary(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no \*\.train\.txt in .*: build the corpus there"):
        dataset.encode(tmp_path, tokenizer)
    (tmp_path / "x.train.txt").write_text("x")
    large = Tokenizer.from_str(tokenizer.to_str())
    large.add_tokens([f"<{number}>" for number in range(2**16)])
    with pytest.raises(ValueError, match="a vocabulary of 65936 does not fit into uint16"):
        dataset.encode(tmp_path, large)
