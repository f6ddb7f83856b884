"""The shipped models are what their cards say."""

import json

import numpy as np
import pytest
import torch

import llama4_lab as l4
from llama4_lab.checkpoint.shipped import MODELS
from llama4_lab.train import behaviour, card, needles, scenes
from llama4_lab.train.lessons import Material
from llama4_lab.train.promises import PROMISES, broken

CARDS = {
    name: card.Card(**json.loads((MODELS / name / "card.json").read_text(encoding="utf-8")))
    for name in PROMISES
}


@pytest.fixture(scope="module", params=list(PROMISES))
def model(request):
    return l4.load(request.param)


def folder(model):
    return model.tokenizer.file.parent


def test_it_opens_in_transformers_with_equal_logits(model):
    from transformers import Llama4ForConditionalGeneration

    hf = Llama4ForConditionalGeneration.from_pretrained(
        folder(model), dtype=torch.float32, attn_implementation="eager"
    )
    example = scenes.sample(np.random.default_rng(0), "colour", scenes.World(tiles=(1, 2)))
    text = card.held_out_texts()["english"][:1500] + example.question
    prompt = model.prompt(text, images=example.images)
    assert prompt.input_ids.shape[1] > 2 * model.config.attention_chunk_size
    with torch.no_grad():
        ours, theirs = model(**prompt), hf(**prompt).logits
    # Logits reach 20 here: their float32 rounding is ten times that of the parity grid.
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


def test_it_is_small_complete_and_has_every_mechanism(model):
    assert sum(path.stat().st_size for path in folder(model).glob("*.safetensors")) <= 40e6
    assert {"config.json", "tokenizer.json", "README.md", "card.json"} <= {
        path.name for path in folder(model).iterdir()
    }
    config = model.config
    assert model.dtype == torch.float32
    assert model.tokenizer.vocab_size == config.vocab_size
    assert config.stop_token_ids == tuple(model.tokenizer.stop_ids)
    assert config.head_dim >= 64
    assert config.max_position_embeddings >= 2048
    assert config.attention_chunk_size == 128
    assert config.use_qk_norm
    assert config.attn_temperature_tuning
    assert [i for i in range(config.num_hidden_layers) if not config.uses_rope(i)]
    assert config.vision_config.tokens_per_tile == 36


def test_the_tokenizer_knows_scenes_keys_and_digits_and_round_trips_every_text(model):
    tokenizer = model.tokenizer
    for word in (*scenes.WORDS, *needles.KEYS):
        assert len(tokenizer.encode(" " + word)) == 1, word
        assert len(tokenizer.encode(word.capitalize())) == 1, word
    assert len(tokenizer.encode("31415")) == 5
    for text in card.held_out_texts().values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_both_read_the_same_tokens():
    files = {(MODELS / name / "tokenizer.json").read_bytes() for name in PROMISES}
    assert len(files) == 1


@pytest.mark.parametrize("name", list(PROMISES))
def test_the_card_keeps_what_is_promised(name):
    assert broken(PROMISES[name], CARDS[name]) == []


def test_a_broken_promise_is_told():
    found = card.Card(**{**vars(CARDS["mini"]), "sums": {"add": 0.01}, "bits_per_byte": {}})
    told = broken(PROMISES["mini"], found)
    assert any("nan" in line for line in told)


@pytest.mark.parametrize("name", list(PROMISES))
def test_the_readme_shows_the_cards_tables(name):
    text = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert card.markdown(CARDS[name]).strip() in text


@pytest.mark.slow
def test_the_cards_figures_are_measured_again(model):
    """On fewer texts and questions: within 15 percent of a loss, and a fifth of all answers."""
    found = CARDS[folder(model).name]
    texts = {name: card.held_out_texts()[name] for name in ("english", "python", "russian")}
    for name, text in texts.items():
        rows = card.windows(model.tokenizer, text[:6000], 512, 1024)
        assert card.bits_per_byte(model, rows) == pytest.approx(found.bits_per_byte[name], rel=0.15)
    hay = card.hay(model.tokenizer, texts["english"])
    near = behaviour.recall(model, hay, 30, 128)
    assert near["same chunk"] == pytest.approx(found.recall["same chunk"]["as trained"], abs=0.2)
    rng = np.random.default_rng(7)
    material = Material(folder(model), model.config.vision_config)
    for task in ("colour_at", "exists", "count"):
        examples = [scenes.sample(rng, task) for _ in range(40)]
        right = behaviour.asked(model, material, examples).mean()
        assert right == pytest.approx(found.pictures[task]["right"], abs=0.2), task
