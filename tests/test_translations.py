"""One text in many languages, and what routing follows in it."""

import numpy as np
import pytest
import torch

import llama4_lab as l4
from llama4_lab.train import translations
from llama4_lab.train.card import held_out_texts

PAGE = """<html><head><title>Some &amp; Other</title></head><body><h1>Heading</h1>
<article data-number="1"><h2>Article 1.</h2><p>First <i>part</i>,</p>
<p>second&nbsp;part.</p></article>
<article data-number="2"><h2>Article 2.</h2><ul><li>An item.</li></ul></article></body></html>"""


def test_articles_are_paragraphs_without_headings_and_markup():
    expected = ("Some & Other", ["First part , second part.", "An item."])
    assert translations.articles(PAGE) == expected


def found_of(counts):
    counts = np.asarray(counts)
    languages = tuple("abcd"[: len(counts)])
    return translations.Translations(languages, tuple(range(counts.shape[2])), counts)


def test_information_is_about_what_the_expert_depends_on():
    """Layer 0 has an expert for each language, layer 1 for each article, layer 2 for neither."""
    counts = np.zeros((4, 4, 3, 4), int)
    for language in range(4):
        for article in range(4):
            counts[language, article, 0, language] = 5
            counts[language, article, 1, article] = 5
            counts[language, article, 2] = 5
    found = found_of(counts)
    assert found.by_language.tolist() == pytest.approx([2, 0, 0])
    assert found.by_article.tolist() == pytest.approx([0, 2, 0])
    chance = found.by_chance(times=50)
    assert chance.shape == (2, 3)
    assert (chance[:, :2] < 1.2).all()  # sixteen passages show a good deal of nothing
    assert chance[:, 2].tolist() == pytest.approx([0, 0])


def test_the_nearest_language_is_the_one_that_routes_most_alike():
    counts = np.array([[9, 1], [1, 9], [7, 3], [2, 8]])[:, None, None]
    assert found_of(counts).nearest(["a", "b"]) == {"c": "a", "d": "b"}
    assert translations._divergence(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])) == 1


def test_a_trained_model_routes_by_language_and_not_by_what_is_said():
    model = l4.load("nano", dtype=torch.float32)
    texts = {}
    for domain in ("english", "russian", "german"):
        words = held_out_texts()[domain].split()
        passages = [" ".join(words[i : i + 30]) for i in range(0, 300, 30)]
        texts[translations.TAUGHT[domain]] = passages
    found = translations.measure(model, texts | {"short": ["a"] * 10})
    assert found.languages == ("English", "Russian", "German, Standard (1996)")
    assert (found.counts.sum(axis=-1) == 16).all()
    language, _ = found.by_chance()
    assert (found.by_language > 3 * language).sum() >= 3
    page = translations.markdown(found, found)
    assert f"| 0 | {found.by_language[0]:.2f} |" in page
    with pytest.raises(ValueError, match="no language has 16 tokens in each of its articles"):
        translations.measure(model, {"short": ["a"]})
