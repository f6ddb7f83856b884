"""Generating in a view: the tokens are those of decoding, edits included; branches differ."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.routing import routing_of
from llama4_lab.generate import sample
from llama4_widgets import slices
from llama4_widgets.app import LabApp
from llama4_widgets.moment import Moment
from llama4_widgets.still import unpack
from llama4_widgets.views import generate
from llama4_widgets.views.generate import GenerateView

TEXT = "def add(a, b):"


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


@pytest.fixture
def view(model):
    view = GenerateView(Moment(model, model.prompt(TEXT)))
    view._temperature.value = 0.0  # always the likeliest
    return view


def write(view, count):
    for _ in range(count):
        view.step()
    view.refresh()


def test_the_likeliest_tokens_are_those_of_generate(view, model):
    write(view, 6)
    expected = l4.generate(model, model.prompt(TEXT), max_new_tokens=6, temperature=0)
    assert view.text() == expected
    model_config = model.config
    slots, chunks = (
        view._cache.slots,
        map(model_config.attention_chunk, range(len(view._cache.layers))),
    )
    live = sum(slots if chunk is None else slots % chunk for chunk in chunks)
    size = live * 2 * model_config.num_key_value_heads * model_config.head_dim * 4 / 1e3
    assert view.board.summary.startswith("6 new tokens")
    assert f"the cache holds {size:,.0f} kB of {slots} tokens" in view.board.summary
    last = view.written[-1]
    said = f"{last.probability:.2f}; the model's distribution there has {last.entropy:.1f} bits"
    assert said in view.board.summary


def test_after_a_run_that_failed_one_can_go_on(view, model, monkeypatch):
    for count in (0, 1):  # of nothing, and with a cache
        write(view, count)
        with monkeypatch.context() as patched:
            patched.setattr(l4.Llama4, "forward", Mock(side_effect=RuntimeError("no memory")))
            view._write()
        assert view.board.problem == "no memory" and len(view.written) == count
    write(view, 5)
    expected = l4.generate(model, model.prompt(TEXT), max_new_tokens=6, temperature=0)
    assert view.text() == expected


def test_no_token_is_written_behind_a_prompt_that_came_meanwhile(model, monkeypatch):
    app = LabApp(model, TEXT, shown=["generate"])
    view, first = app.views["generate"], app.moment
    assert isinstance(view, GenerateView)

    def draw_meanwhile(*args):
        running.append(pool.submit(app.run, "two"))
        while app.moment is first:
            time.sleep(0.001)
        time.sleep(0.05)  # for what must not happen
        return sample(*args)

    monkeypatch.setattr(generate, "sample", draw_meanwhile)
    running: list[Any] = []
    with ThreadPoolExecutor() as pool:
        view.step()
        running[0].result()
    assert view.moment is app.moment and view.written == []


def test_entropy_probability_and_experts_are_the_models(view, model):
    write(view, 4)
    ids = torch.cat([view.moment.prompt.input_ids, torch.tensor([[w.id for w in view.written]])], 1)
    with torch.no_grad():
        p = model(ids)[0, -5:-1].double().softmax(-1)
    bits = -(p * p.log2()).sum(-1)
    np.testing.assert_allclose(unpack(view.board.content.arrays["entropy"]), bits, atol=1e-4)
    chosen = p.gather(1, ids[0, -4:, None])[:, 0]
    np.testing.assert_allclose([w.probability for w in view.written], chosen, atol=1e-5)
    whole = routing_of(model, model.prompt(TEXT + view.text()))
    shown = unpack(view.board.content.arrays["experts"])
    assert np.array_equal(shown, whole.expert[:, -5:-1, 0])


def test_edits_change_what_is_written(view, model):
    view.moment = view.moment.with_edits([E.SkipLayer(0), E.SkipLayer(1)])
    assert view.written == []
    write(view, 5)
    with E.edited(model, view.moment.edits):
        expected = l4.generate(model, model.prompt(TEXT), max_new_tokens=5, temperature=0)
    assert view.text() == expected


def test_an_edit_of_chunks_holds_from_the_prompt_on(view, model):
    view.moment = Moment(model, model.prompt(TEXT)).with_edits([E.Chunk(i, 3) for i in range(3)])
    write(view, 5)
    with E.edited(model, view.moment.edits):
        expected = l4.generate(model, model.prompt(TEXT), max_new_tokens=5, temperature=0)
    assert view.board.problem == "" and view.text() == expected


def test_nothing_is_written_behind_a_stop_token(view, monkeypatch):
    write(view, 2)
    monkeypatch.setattr(type(view.moment.model.config), "stop_token_ids", (view.written[-1].id,))
    view._write()
    assert len(view.written) == 2 and len(view._ids()) == 1
    view.branch(1)
    assert len(view.written) == 2


def test_it_is_told_why_play_stopped(view, monkeypatch):
    monkeypatch.setattr(generate, "_MOST", 3)
    view._play.value = True  # outside of a notebook it writes at once
    assert len(view.written) == 3 and not view._play.value
    assert view.board.summary.endswith(". Play stops here; Step goes on.")
    last = view.written[-1].id
    monkeypatch.setattr(type(view.moment.model.config), "stop_token_ids", (last,))
    view.refresh()
    assert view.board.summary.endswith(f". ‘{view.moment.word(last)}’ ends it.")


def test_a_branch_keeps_what_stands_before_it(view):
    write(view, 5)
    before, text = list(view.written), view.text()
    view._temperature.value = 2.0
    view.branch(3)
    assert view.written[:3] == before[:3] and len(view.written) == 4
    assert view.branches == [text]
    with pytest.raises(ValueError, match="no new token 9 to branch at: 4 were written"):
        view.branch(9)


def test_play_writes_until_pause_and_lets_the_kernel_work(view):
    async def press() -> int:
        view._play.value = True
        while len(view.written) < 3:
            await asyncio.sleep(0.01)
        view._play.value = False
        await asyncio.sleep(0.05)
        return len(view.written)

    count = asyncio.run(press())
    assert count == len(view.written) and 3 <= count < 50


def test_an_interrupt_of_the_kernel_ends_play(view):
    async def press() -> None:
        view._play.value = True
        while len(view.written) < 3:
            await asyncio.sleep(0.01)
        slices._hear()
        while view._play.value:
            await asyncio.sleep(0.01)

    asyncio.run(press())
    assert len(view.written) < 50 and view.board.summary == "Stopped: the kernel was interrupted."
    view._write()
    assert "new tokens; the last had" in view.board.summary


def test_what_was_written_can_be_looked_at_in_all_views(model):
    app = LabApp(model, TEXT, shown=["router", "generate"])
    view = app.views["generate"]
    view._temperature.value = 0.0
    write(view, 3)
    text = TEXT + view.text()
    view.keep()
    assert app.moment.tokens == model.prompt(text).tokens
    assert app.prompt == app.bar.text.value == text
    assert view.written == []
    view.keep()  # nothing
    assert app.prompt == text
    view.branch(0)
    assert view.branches == []


def test_a_long_branch_is_shown_from_its_end(view):
    write(view, 1)
    view.branches = [" so it goes", "word " * 60]
    view.refresh()
    (panel,) = [panel for panel in view.board.content.panels if panel["name"] == "branches"]
    (short,), (long,) = panel["rows"]
    assert short == "so it goes"
    assert long.startswith("… ") and long.endswith("word word") and len(long) <= 122


def test_edits_that_leave_no_next_token_are_told_each_time(view, model):
    edits = [E.AttentionTemperature(3, scale=1e300)]
    view.moment = Moment(model, model.prompt("12 + 7 = 19\n" * 4), edits)
    for _ in range(2):
        view._write()
        assert "there is no next token" in view.board.problem


def test_a_kept_page_names_no_button(view):
    assert view.board.state()["summary"] == "When this was kept: Nothing was written yet."


def test_a_model_without_experts_writes_as_well(model):
    dense = l4.random(model.config.replace(moe_layers=()), seed=0)
    dense.tokenizer = model.tokenizer
    view = GenerateView(Moment(dense, model.prompt(TEXT)))
    assert not view.board.problem
    write(view, 3)
    assert not view.board.problem and view.board.summary.startswith("3 new tokens")
    assert [panel["name"] for panel in view.board.content.panels] == ["entropy", "following"]


def test_without_a_tokenizer_numbers_are_written(model):
    bare = model.apart()
    bare.tokenizer = None
    view = GenerateView(Moment(bare, model.prompt(TEXT)))
    write(view, 2)
    view.branch(1)
    assert not view.board.problem and len(view.written) == 2
    assert view.branches[0].split()[0] == str(view.written[0].id)
