"""The card's arithmetic on models whose figures are known."""

import math

import numpy as np
import pytest
import torch
from small_tokenizer import small_tokenizer
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab.train import behaviour, card, held_out

TEXT = "The quick brown fox jumps over the lazy dog. Über den Fluß — " * 20


@pytest.fixture
def quick(monkeypatch):
    """Ask for little, so that short texts are enough."""
    monkeypatch.setattr(card, "PROMPTS", {})
    monkeypatch.setattr(card, "EDGES", (0, 20, 50))
    monkeypatch.setattr(behaviour, "DISTANCES", ((1, 500),))


@pytest.fixture
def model(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    config = CONFIG.replace(
        vocab_size=tokenizer.vocab_size,
        vision_config=None,
        num_experts_per_tok=1,
        attention_chunk_size=256,
        pad_token_id=tokenizer.pad_id,
    )
    model = l4.random(config).eval()
    model.tokenizer = tokenizer
    return model


def test_a_model_that_knows_nothing_needs_log2_of_its_vocabulary_a_token(model):
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = card.windows(model.tokenizer, TEXT, 16, 10_000)
    scored = rows[:, 1:].flatten().tolist()
    size = sum(len(model.tokenizer.token_bytes(idx)) for idx in scored)
    expected = len(scored) * math.log2(model.config.vocab_size) / size
    assert card.bits_per_byte(model, rows) == pytest.approx(expected, rel=1e-5)


def test_windows_cover_the_text_without_overlap(model):
    ids = model.tokenizer.encode(TEXT)
    rows = card.windows(model.tokenizer, TEXT, 16, 100)
    assert rows.shape == (6, 16)
    assert rows.flatten().tolist() == ids[:96]


def test_a_card_holds_every_domain_and_layer(model, quick):
    texts = {"english": TEXT, "german": TEXT.upper()}
    measured = card.measure(model, texts, length=16, count=2)
    assert list(measured.bits_per_byte) == ["english", "german"]
    assert measured.layers == [1, 3, 5]
    share = np.array([measured.share["english"], measured.share["german"]])
    np.testing.assert_allclose(share.sum(-1), 1, atol=0.01)
    np.testing.assert_allclose(share.mean(0).max(-1), measured.fullest, atol=0.001)
    # The model is its own untrained control: random weights of the same seed.
    assert measured.information == measured.information_untrained
    assert list(measured.information) == ["domain", "language"]
    assert list(measured.recall) == ["same chunk", "1 to 500"]
    assert measured.pictures == {}
    assert list(measured.loss_by_position) == ["1 to 20", "21 to 50"]
    text = card.markdown(measured)
    assert "| english |" in text
    assert "| same chunk | 0% | 0% | 0% |" in text


def test_the_shipped_texts_are_there_for_every_domain():
    texts = card.held_out_texts()
    assert set(texts) == set(card.PROMPTS)
    assert all(len(text) > 2000 for text in texts.values())


def test_held_out_texts_are_cut_from_many_documents_and_read_from_the_declaration(
    tmp_path, monkeypatch
):
    for domain in ("english", "python", "arithmetic"):
        documents = [f"{domain} {i}\n" + "line of words\n" * 900 for i in range(9)]
        (tmp_path / f"{domain}.held.txt").write_text("\f\n".join(documents))
    page = b"<html><body>\n<h1>T&amp;T</h1><p>All <b>human</b>\n   beings</p></body></html>"
    pages = [(f"declaration/{code}.html", page) for code in held_out.TRANSLATIONS.values()]
    monkeypatch.setattr(held_out, "fetch", lambda source, folder: folder)
    monkeypatch.setattr(held_out, "members", lambda path, wanted: iter(pages))
    sizes = held_out.write_held_out(tmp_path, tmp_path / "out")
    assert set(sizes) == set(card.PROMPTS)
    assert (tmp_path / "out" / "russian.txt").read_text() == "T&T\n\nAll human\nbeings\n"
    english = (tmp_path / "out" / "english.txt").read_text()
    assert [english.count(f"english {i}\n") for i in range(9)] == [1] * 9
    assert all(
        line in ("", "line of words") for line in english.splitlines() if "english" not in line
    )
    assert 48_000 <= sizes["english"] < 56_000


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no held-out texts"):
        card.held_out_texts(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/none: give that of"):
        card.held_out_texts(tmp_path / "none")


def test_domains_that_are_empty_or_too_short_are_left_out_and_named(model, quick, tmp_path, capsys):
    for name, text in (("english", TEXT), ("german", ""), ("python", TEXT[:30])):
        (tmp_path / f"{name}.held.txt").write_text(text)
        np.array(model.tokenizer.encode(text), "<u2").tofile(tmp_path / f"{name}.train.bin")
    trained_on = card.training_tokens(tmp_path)
    assert list(trained_on) == ["english", "python"]
    texts = card.held_out_texts(tmp_path)
    measured = card.measure(model, texts, length=16, count=2)
    size = len(model.tokenizer.encode(TEXT[:30]))
    said = f"left out, with fewer than 51 tokens: german (0), python ({size})\n"
    assert said in capsys.readouterr().err
    assert list(measured.bits_per_byte) == list(measured.share) == ["english"]
    del texts["english"]
    with pytest.raises(
        ValueError, match=r"no held-out text has the 51 tokens that a card needs: g"
    ):
        card.measure(model, texts)
