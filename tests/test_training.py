"""The training loop on a tiny corpus: it learns, balances, and goes on after a kill."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab.analysis.specialisation import mutual_information, specialisation
from llama4_lab.train import loop
from llama4_lab.train.balance import switch_loss
from llama4_lab.train.mixture import Mixture
from llama4_lab.train.muon import Muon, orthogonalise
from llama4_lab.train.recipes import MINI, NANO, Recipe

RECIPE = Recipe(
    "tiny",
    CONFIG.replace(vision_config=None, num_experts_per_tok=1),
    weights={"low": 3.0, "high": 1.0},
    rows=8,
    length=24,
    steps=30,
    warmup=5,
    matrix_lr=0.02,
    adam_lr=1e-2,
)


@pytest.fixture
def data(tmp_path):
    """Two domains: counting up, over two different ranges of ids."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, first in (("low", 10), ("high", 50)):
        ids = np.tile(np.arange(first, first + 30, dtype="<u2"), 40)
        ids.tofile(folder / f"{name}.train.bin")
    return Mixture(folder, RECIPE.weights)


def read_log(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_loop_learns_and_logs_every_step(data, tmp_path):
    model = loop.train(RECIPE, data, tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert [int(row["step"]) for row in log] == list(range(1, 31))
    assert float(log[-1]["loss"]) < 0.5 < 4 < float(log[0]["loss"])
    with torch.no_grad():
        assert model(torch.arange(10, 20)[None])[0, -1].argmax() == 20


def test_training_goes_on_after_a_kill_as_if_nothing_had_happened(data, tmp_path):
    class Killed(BaseException):
        pass

    def kill(step, model):
        if step == 17:
            raise Killed

    whole = loop.train(RECIPE, data, tmp_path / "whole")
    with pytest.raises(Killed):
        loop.train(RECIPE, data, tmp_path / "run", save_minutes=0.0, on_step=kill)
    resumed = loop.train(RECIPE, data, tmp_path / "run")
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name]), name
    losses = [[row["loss"] for row in read_log(tmp_path / run)] for run in ("whole", "run")]
    assert losses[0] == losses[1]


def test_an_interrupt_saves_and_returns(data, tmp_path):
    def interrupt(step, model):
        if step == 4:
            raise KeyboardInterrupt

    loop.train(RECIPE, data, tmp_path, on_step=interrupt)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 4


def test_a_state_of_another_model_is_refused(data, tmp_path):
    loop.train(dataclasses.replace(RECIPE, steps=1), data, tmp_path)
    other = dataclasses.replace(RECIPE, config=RECIPE.config.replace(hidden_size=64))
    with pytest.raises(ValueError, match="holds a model of other sizes than this recipe"):
        loop.train(other, data, tmp_path)


def test_a_diverged_run_stops_and_says_so(tmp_path):
    log = loop.Log(tmp_path / "log.csv", 0)
    with pytest.raises(FloatingPointError, match="training diverged"):
        log.write(step=1, loss=float("nan"))


def test_batches_follow_the_weights_and_depend_on_seed_and_step_only(data):
    rows = data.batch(0, 5, 8, 24)
    assert rows.shape == (8, 25)
    assert (rows.amax(1) < 45).sum() == 6
    assert torch.equal(rows, data.batch(0, 5, 8, 24))
    assert not torch.equal(rows, data.batch(0, 6, 8, 24))
    assert (rows.diff(dim=1) == 1).float().mean() > 0.9


def test_a_missing_domain_names_the_file_and_the_command(data):
    with pytest.raises(
        FileNotFoundError, match=r"none.train.bin is missing: build the corpus with"
    ):
        Mixture(data.folder, {"none": 1.0})


def test_an_empty_domain_is_refused(data):
    (data.folder / "german.train.bin").touch()
    with pytest.raises(ValueError, match=r"german.train.bin is empty: this corpus has no text for"):
        Mixture(data.folder, {"german": 1.0})


def test_muon_makes_updates_orthogonal_for_every_matrix_of_a_stack():
    stack = torch.randn(3, 20, 12)
    update = orthogonalise(stack)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5
    assert values.max() < 1.4
    for matrix, whole in zip(stack, update, strict=True):
        # bfloat16 products of one matrix and of a stack may round differently.
        torch.testing.assert_close(orthogonalise(matrix), whole, atol=0.03, rtol=0)


def test_muon_equals_torchs_on_one_matrix():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(12, 20)) for _ in range(2))
    a = Muon([ours], lr=0.1)
    b = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        ours.grad = torch.randn(12, 20)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    # Both iterate in bfloat16, in another order of operations.
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0)


def test_switch_loss_is_one_when_balanced_and_e_when_collapsed():
    balanced = torch.eye(4).repeat(5, 1) * 50
    collapsed = torch.eye(4)[:1].repeat(20, 1) * 50
    assert switch_loss(balanced).item() == pytest.approx(1.0)
    assert switch_loss(collapsed).item() == pytest.approx(4.0)
    transformers = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(40, 4)
    theirs = transformers.load_balancing_loss_func((logits,), 4, top_k=1)
    torch.testing.assert_close(switch_loss(logits), theirs)


def test_specialisation_counts_what_the_router_chose():
    model = l4.random(RECIPE.config).eval()
    ids = torch.randint(4, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    found = specialisation(model, {"a": [ids[:2], ids[2:]], "b": [ids[:1]]})
    assert found.layers == (1, 3, 5)
    with torch.no_grad(), l4.trace(model, "layers.3.router.logits") as cache:
        model(ids)
    chosen = cache["layers.3.router.logits"].argmax(-1).flatten()
    np.testing.assert_allclose(found.share[0, 1], np.bincount(chosen, minlength=5) / 60)
    assert found.mutual_information.shape == (3,)


def test_mutual_information_against_its_definition():
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(5), size=3)
    joint = share / 3
    expected = sum(
        joint[d, e] * np.log2(joint[d, e] / (joint[d].sum() * joint[:, e].sum()))
        for d in range(3)
        for e in range(5)
    )
    assert mutual_information(share) == pytest.approx(expected)


@pytest.mark.parametrize(("recipe", "low", "high"), [(MINI, 11e6, 19e6), (NANO, 1.5e6, 3.5e6)])
def test_the_recipes_have_every_mechanism(recipe, low, high):
    config = recipe.config
    assert low < config.parameter_counts()["total"] < high
    assert config.head_dim >= 64
    assert config.use_qk_norm
    assert config.attn_temperature_tuning
    assert not config.uses_rope(3)
