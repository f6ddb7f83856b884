"""Sampling, stop tokens, streaming, interruption."""

import inspect
from fractions import Fraction

import pytest
import torch
from tiny import tiny

import llama4_lab as l4
from llama4_lab.generate import sample, tokens


class Letters:
    """A tokenizer that writes every id as one character."""

    def decode(self, ids):
        return "".join(chr(idx + 32) for idx in ids)

    def stream(self, ids):
        for idx in ids:
            yield chr(idx + 32)


@pytest.fixture
def model():
    model = tiny(vision_config=None)
    model.tokenizer = Letters()
    return model


@pytest.fixture
def prompt():
    return {"input_ids": torch.randint(4, 97, (1, 11), generator=torch.Generator().manual_seed(0))}


def test_greedy_decoding_takes_the_likeliest_token_of_the_whole_text_each_time(model, prompt):
    ids = prompt["input_ids"]
    for step in tokens(model, prompt, 12, temperature=0.0, stop=()):
        with torch.no_grad():
            assert step.item() == model(ids)[0, -1].argmax().item()
        ids = torch.cat([ids, step[:, None]], dim=1)
    assert ids.shape[1] == 23


def test_a_seed_fixes_the_text_and_streaming_gives_the_same(model, prompt):
    text = l4.generate(model, prompt, 20, seed=3, temperature=1.5)
    assert text == l4.generate(model, prompt, 20, seed=3, temperature=1.5)
    assert text != l4.generate(model, prompt, 20, seed=4, temperature=1.5)
    assert text == "".join(l4.generate(model, prompt, 20, seed=3, temperature=1.5, stream=True))


def test_generation_ends_at_a_stop_token_and_leaves_it_out(model, prompt):
    free = [step.item() for step in tokens(model, prompt, 12, temperature=0.0, stop=())]
    stop = free[4]
    text = l4.generate(model, prompt, 12, temperature=0.0, stop=(stop,))
    assert text == Letters().decode(free[: free.index(stop)])
    pieces = l4.generate(model, prompt, 12, temperature=0.0, stop=(stop,), stream=True)
    assert "".join(pieces) == text


def test_each_new_token_takes_one_pass(model, prompt):
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert len([*tokens(model, prompt, 5, temperature=0.0, stop=())]) == len(passes) == 5


def test_a_padded_batch_gives_each_row_its_own_text(model):
    model = tiny(vision_config=None, attn_temperature_tuning=False)  # else padding slots count
    model.tokenizer = Letters()
    ids = torch.randint(4, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    texts = l4.generate(model, batch, 15, temperature=0.0, stop=())
    alone = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, 4:]}]
    assert texts == [l4.generate(model, row, 15, temperature=0.0, stop=()) for row in alone]


def test_an_interrupt_keeps_the_text_so_far(model, prompt, monkeypatch):
    calls = 0
    forward = model.forward

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    whole = l4.generate(model, prompt, 12, temperature=0.0, stop=())
    monkeypatch.setattr(model, "forward", interrupted)
    assert l4.generate(model, prompt, 12, temperature=0.0, stop=()) == whole[:5]


def test_the_nucleus_is_the_smallest_set_that_holds_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    drawn = sample(logits, 1.0, 0.75, torch.Generator().manual_seed(0)).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    for top_p in (1e-9, 1e-300):
        assert sample(logits, 1.0, top_p).unique().tolist() == [0]
    for temperature in (1e-30, 1e-38, 1e-300):
        assert sample(logits - 30, temperature, 1.0).unique().tolist() == [0]
    hot = sample(logits, 100.0, 1.0, torch.Generator().manual_seed(0)).bincount(minlength=4) / 4000
    torch.testing.assert_close(hot, torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_a_top_p_of_one_keeps_every_token(monkeypatch):
    def multinomial(probability, *_, **__):
        kept.append(probability)
        return torch.zeros(len(probability), 1, dtype=torch.long)

    kept = []
    monkeypatch.setattr(torch, "multinomial", multinomial)
    logits = torch.linspace(0, -60, 500) * torch.linspace(0.5, 1.2, 50)[:, None]
    sample(logits, 1.0, 1)
    assert (kept[0] > 0).all()
    assert (kept[0].cumsum(-1)[:, :-1] >= 1).any()  # in float32, long before the end


def test_texts_and_tokens_are_made_alike_unless_told_otherwise():
    ways = [inspect.signature(each).parameters for each in (l4.generate, tokens)]
    names = ("max_new_tokens", "temperature", "top_p", "seed", "stop")
    for each in ways:
        assert [each[name].default for name in names] == [64, 0.6, 0.9, None, None]


def test_settings_may_be_any_numbers(model, prompt):
    steps = [
        [*inspect.unwrap(tokens)(model, prompt, 5, temperature=half, top_p=half, seed=0, stop=())]
        for half in (0.5, Fraction(1, 2))
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"temperature": -1.0},
            "temperature -1.0 is negative or no number: use 0 for the likeliest token, or more",
        ),
        ({"top_p": 0.0}, r"top_p 0.0 is outside \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 makes no token: ask for at least 1"),
        ({"seed": 2**70}, rf"seed {2**70} is outside 64 bits: give -2\*\*63 to 2\*\*64 - 1"),
    ],
)
def test_settings_outside_their_range_are_refused(model, prompt, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        l4.generate(model, prompt, **options)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_every_seed_of_64_bits_is_taken(model, prompt, seed):
    assert len(l4.generate(model, prompt, 2, seed=seed, stop=())) == 2


def test_what_is_no_number_and_what_is_no_prompt_is_refused(model, prompt):
    with pytest.raises(TypeError, match=r"max_new_tokens=1\.5: give whole numbers"):
        inspect.unwrap(tokens)(model, prompt, 1.5)
    for name in ("temperature", "top_p"):
        with pytest.raises(TypeError, match=rf"^{name}='1': give a number$"):
            inspect.unwrap(tokens)(model, prompt, **{name: "1"})
    with pytest.raises(ValueError, match="input_ids is a list: give a tensor"):
        l4.generate(model, {"input_ids": [[5, 6, 7]]})
    with pytest.raises(ValueError, match="'role', 'content' make no prompt: give input_ids, or"):
        l4.generate(model, {"role": "user", "content": "hello"})


def test_a_model_without_tokenizer_writes_no_text(prompt):
    with pytest.raises(ValueError, match="this model has no tokenizer to write text with"):
        l4.generate(tiny(), prompt)


def test_streaming_a_batch_is_refused(model):
    batch = {"input_ids": torch.full((2, 3), 5)}
    with pytest.raises(ValueError, match="stream=True takes one prompt, this is a batch of 2"):
        l4.generate(model, batch, stream=True)


def test_ids_will_do_for_a_prompt(model, prompt):
    text = l4.generate(model, prompt, 8, seed=3)
    assert l4.generate(model, prompt["input_ids"][0], 8, seed=3) == text


def test_text_is_written_under_autocast(model, prompt):
    with torch.autocast("cpu", torch.bfloat16):
        text = l4.generate(model, prompt, 6, temperature=0)
        first = model(**prompt)[0, -1].argmax().item()
    assert text[0] == chr(first + 32)
