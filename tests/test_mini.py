"""The shipped model is what its card says."""

import json

import pytest
import torch

import llama4_lab as l4
from llama4_lab.checkpoint.shipped import MODELS
from llama4_lab.train import card

CARD = json.loads((MODELS / "mini" / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def mini():
    return l4.load("mini")


def test_mini_opens_in_transformers_with_equal_logits(mini):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(
        MODELS / "mini", dtype=torch.float32, attn_implementation="eager"
    )
    ids = mini.prompt(card.held_out_texts()["english"])["input_ids"][:, :600]
    with torch.no_grad():
        ours, theirs = mini(ids), hf(ids).logits
    # Logits reach 20 here: their float32 rounding is ten times that of the parity grid.
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


def test_mini_is_small_and_complete(mini):
    folder = MODELS / "mini"
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 40e6
    assert {"config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert mini.dtype == torch.float32
    assert mini.tokenizer.vocab_size == mini.config.vocab_size
    assert mini.config.stop_token_ids == tuple(mini.tokenizer.stop_ids)


def test_the_tokenizer_round_trips_every_held_out_text(mini):
    for text in card.held_out_texts().values():
        assert mini.tokenizer.decode(mini.tokenizer.encode(text)) == text


def test_the_card_meets_what_is_promised_of_its_experts():
    information = CARD["mutual_information"]
    assert sum(bits >= 0.5 for bits in information) >= len(information) / 2
    control = CARD["mutual_information_untrained"]
    assert all(untrained < 0.3 for untrained in control)
    assert max(CARD["fullest"]) <= 0.35
    assert min(CARD["emptiest"]) >= 0.02


def test_the_readme_shows_the_cards_tables():
    text = (MODELS / "mini" / "README.md").read_text(encoding="utf-8")
    shown = card.markdown(card.Card(**CARD))
    assert shown.strip() in text


@pytest.mark.slow
def test_the_cards_losses_are_measured_again(mini):
    texts = card.held_out_texts()
    texts = {name: texts[name][:6000] for name in ("english", "python", "russian")}
    rows = {name: card.windows(mini.tokenizer, text, 512, 1024) for name, text in texts.items()}
    for name, ids in rows.items():
        # The beginning of each text stands for the whole of it: within 15 percent.
        assert card.bits_per_byte(mini, ids) == pytest.approx(CARD["bits_per_byte"][name], rel=0.15)
