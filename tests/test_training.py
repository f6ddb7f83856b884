"""The training loop on a tiny corpus: it learns, balances, and goes on after a kill."""

import csv
import dataclasses
import os
import shlex
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab import cli
from llama4_lab.analysis.specialisation import mutual_information, specialisation
from llama4_lab.checkpoint.shipped import MODELS
from llama4_lab.points import NO_TAP
from llama4_lab.precision import mixed, product_dtype
from llama4_lab.prompt import Tokenizer
from llama4_lab.train import loop, step
from llama4_lab.train.balance import Bias, switch_loss
from llama4_lab.train.lessons import Material, Text
from llama4_lab.train.mixture import Mixture
from llama4_lab.train.muon import Muon, orthogonalise
from llama4_lab.train.recipes import MINI, NANO, RECIPES, Recipe, Stage
from llama4_lab.train.rows import padded

DOMAINS = {"low": 3.0, "high": 1.0}
RECIPE = Recipe(
    "tiny",
    CONFIG.replace(vision_config=None, num_experts_per_tok=1),
    stages=(
        Stage(0.5, (Text(8, domains=DOMAINS, length=24),)),
        Stage(0.5, (Text(4, domains=DOMAINS, length=24), Text(4, 2.0, "more", DOMAINS, 12))),
    ),
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
    return Material(folder)


def read_log(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_loop_learns_and_logs_every_step(data, tmp_path):
    model = loop.train(RECIPE, data, tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert [int(row["step"]) for row in log] == list(range(1, 31))
    assert float(log[-1]["loss"]) < 0.5 < 4 < float(log[0]["loss"])
    assert float(log[-1]["text_right"]) > 0.9
    assert log[0]["more"] == "" != log[-1]["more"]
    assert [int(log[i]["tokens"]) for i in (14, 29)] == [15 * 192, 15 * 192 + 15 * 144]
    with torch.no_grad():
        assert model(torch.arange(10, 20)[None])[0, -1].argmax() == 20


@pytest.mark.parametrize("bias_rate", [0.0, 0.02])
@pytest.mark.slow
def test_training_goes_on_after_a_kill_as_if_nothing_had_happened(data, tmp_path, bias_rate):
    class Killed(BaseException):
        pass

    def kill(step, model):
        if step == 17:
            raise Killed

    recipe = dataclasses.replace(RECIPE, bias_rate=bias_rate)
    whole = loop.train(recipe, data, tmp_path / "whole")
    with pytest.raises(Killed):
        loop.train(recipe, data, tmp_path / "run", save_minutes=0.0, on_step=kill)
    resumed = loop.train(recipe, data, tmp_path / "run")
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name]), name
    losses = [[row["loss"] for row in read_log(tmp_path / run)] for run in ("whole", "run")]
    assert losses[0] == losses[1]


def test_tensorboard_shows_the_curves_of_the_log_once_each_step(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def keep(step, model):
        if step == 5:
            shutil.copy(tmp_path / "state.pt", tmp_path / "early.pt")

    short = dataclasses.replace(RECIPE, steps=9)
    loop.train(short, data, tmp_path, tensorboard=True, save_minutes=0.0, on_step=keep)
    os.replace(tmp_path / "early.pt", tmp_path / "state.pt")  # as if killed before the next save
    loop.train(dataclasses.replace(RECIPE, steps=20), data, tmp_path, tensorboard=True)
    shown = EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "text_right", "more", "lr"):
        logged = [(int(row["step"]), float(row[name])) for row in read_log(tmp_path) if row[name]]
        events = shown.Scalars(name)
        assert [event.step for event in events] == [step for step, _ in logged]
        assert [event.value for event in events] == pytest.approx([value for _, value in logged])


def test_tensorboard_that_is_not_installed_is_said_before_anything_is_done(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install "llama4-lab\[tensorboard\]"'):
        loop.train(RECIPE, data, tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run" / "log.csv").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_inside_a_step_ends_it_saves_and_is_passed_on(data, tmp_path, monkeypatch, number):
    whole = loop.train(RECIPE, data, tmp_path / "whole")
    update, steps = loop.update, []

    def interrupted(*given, **options):
        done = update(*given, **options)
        steps.append(done)
        if len(steps) == 4:  # weights have moved, and the step is not counted yet
            os.kill(os.getpid(), number)
        return done

    before = signal.getsignal(number)
    monkeypatch.setattr(loop, "update", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"the state after step 4 is kept in .*run$"):
        loop.train(RECIPE, data, tmp_path / "run")
    assert signal.getsignal(number) == before
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 4
    model = loop.train(RECIPE, data, tmp_path / "run")
    assert len(steps) == RECIPE.steps
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name


def test_a_second_interrupt_breaks_off_and_leaves_what_was_saved(data, tmp_path):
    def interrupt(step, model):
        if step == 4:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop.train(RECIPE, data, tmp_path, on_step=interrupt, save_minutes=0)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 4


def train_from_the_command_line(monkeypatch, data, out, recipe=RECIPE):
    monkeypatch.setitem(RECIPES, "nano", recipe)
    command = ["train", "nano", "--corpus", str(data.folder), "--out", str(out)]
    return cli.main(command)


def test_an_interrupted_command_goes_on_and_says_how_to_measure_what_is_whole(
    data, tmp_path, monkeypatch, capsys
):
    def interrupted(*given, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return update(*given, **options)

    update, out = loop.update, tmp_path / "my run"
    monkeypatch.setattr(loop, "update", interrupted)
    (data.folder / "tokenizer.json").write_text("{}")
    assert train_from_the_command_line(monkeypatch, data, out) == 130
    told = capsys.readouterr()
    goes_on = f"the same command goes on from what is kept in {out}"
    assert told.err.splitlines()[-1] == f"llama4-lab: interrupted: {goes_on}"
    assert told.out == "" and not (out / "model").exists()
    monkeypatch.setattr(loop, "update", update)
    assert train_from_the_command_line(monkeypatch, data, out) == 0
    said, _, command = capsys.readouterr().out.partition("; measure it with: ")
    assert said == f"saved to {out}/model"
    expected = ["llama4-lab", "card", f"{out}/model", "--promises", "tiny"]
    assert shlex.split(command) == expected


def test_an_interruption_before_anything_is_kept_promises_nothing(
    data, tmp_path, monkeypatch, capsys
):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "teach_patches", interrupted)
    recipe = dataclasses.replace(RECIPE, config=CONFIG)
    assert train_from_the_command_line(monkeypatch, data, tmp_path / "run", recipe) == 130
    assert capsys.readouterr().err == "\nllama4-lab: interrupted\n"


def test_a_run_without_its_corpus_leaves_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is missing: build the corpus"):
        loop.train(RECIPE, Material(tmp_path / "corpus"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_damaged_state_is_named_with_what_to_do(data, tmp_path, share):
    loop.train(dataclasses.replace(RECIPE, steps=1), data, tmp_path)
    state = tmp_path / "state.pt"
    os.truncate(state, int(share * state.stat().st_size))
    with pytest.raises(ValueError, match=r"state\.pt is damaged: remove it to start again$"):
        loop.train(RECIPE, data, tmp_path)


def stages_of(folder):
    return ["more" if row["more"] else "text" for row in read_log(folder)]


def test_a_run_made_longer_teaches_each_stage_as_long_as_a_run_at_once(data, tmp_path):
    loop.train(dataclasses.replace(RECIPE, steps=4), data, tmp_path)
    assert stages_of(tmp_path) == ["text"] * 2 + ["more"] * 2
    loop.train(RECIPE, data, tmp_path)
    assert stages_of(tmp_path)[4:] == ["text"] * 11 + ["more"] * 15


@pytest.mark.parametrize("is_timed", [False, True])
@pytest.mark.parametrize(
    ("old", "new", "steps"), [(60, 90, 35), (90, 60, 35), (60, 90, 25), (20, 90, 20), (90, 30, 29)]
)
def test_a_course_of_another_length_is_where_a_run_at_once_would_be(old, new, steps, is_timed):
    """One second a step; the goal of the second stage is reached after 28 steps, if not over."""
    stages = [Stage(1.0, ()), Stage(3.0, (), ("echo", 0.8)), Stage(1.0, ()), Stage(1.0, ())]
    before, after = (loop.Plan(n, n / 60 if is_timed else None) for n in (old, new))

    def course(plan):
        course = loop.Course(stages)
        for i in range(steps):
            course.stage(plan.done(i, i))
            course.note({"echo_right": float(i >= 20)})
        return course

    at_once, resumed = course(after), loop.Course(stages)
    resumed.load_state_dict(course(before).state_dict())
    for plan in (after, before, after):
        resumed.replan(plan, steps)
    assert (resumed.index, resumed.end) == (at_once.index, pytest.approx(at_once.end))


@pytest.mark.parametrize(
    "changes",
    [
        {"matrix_lr": 0.5},
        {"stages": RECIPE.stages[:1], "seed": 3},
        {"config": RECIPE.config.replace(rope_theta=77.0)},
    ],
)
def test_a_run_goes_on_with_its_own_recipe_only(data, tmp_path, changes):
    loop.train(dataclasses.replace(RECIPE, steps=1), data, tmp_path)
    kept = (tmp_path / "log.csv").read_bytes()
    with pytest.raises(ValueError) as raised:
        loop.train(dataclasses.replace(RECIPE, **changes), data, tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}/state.pt was trained by a recipe with other settings ({', '.join(changes)}); "
        "choose another folder or remove it"
    )
    assert (tmp_path / "log.csv").read_bytes() == kept
    loop.train(dataclasses.replace(RECIPE, steps=2, minutes=3.0), data, tmp_path)


def test_a_budget_may_be_a_number_of_numpy(data, tmp_path):
    for _ in range(2):
        loop.train(RECIPE, data, tmp_path, budget_minutes=np.float64(1e-4))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["plan"] == (30, 1e-4)


def test_a_state_of_before_recipes_were_kept_goes_on(data, tmp_path):
    loop.train(dataclasses.replace(RECIPE, steps=2), data, tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name in ("recipe", "plan", "bias"):
        del state[name]
    del state["course"]["steps"], state["course"]["reached"]
    torch.save(state, tmp_path / "state.pt")
    loop.train(dataclasses.replace(RECIPE, steps=3), data, tmp_path)
    course = torch.load(tmp_path / "state.pt", weights_only=True)["course"]
    assert (course["index"], course["steps"]) == (1, 3)


@pytest.mark.parametrize(
    "state", [{"epoch": 1}, [1], torch.zeros(2), {"model.weight": torch.zeros(2)}]
)
def test_a_state_of_something_else_is_refused(data, tmp_path, state):
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt is no state of a training run; choose ano"):
        loop.train(RECIPE, data, tmp_path)


def test_the_vision_encoder_is_taught_once_even_if_that_takes_the_whole_budget(
    data, tmp_path, monkeypatch
):
    taught = []
    monkeypatch.setattr(loop, "teach_patches", lambda *_: (taught.append(1), time.sleep(0.1)))
    recipe = dataclasses.replace(RECIPE, config=CONFIG.replace(num_experts_per_tok=1))
    for _ in range(3):
        loop.train(recipe, data, tmp_path, budget_minutes=0.001)
    assert len(taught) == 1
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 0


def test_an_interrupted_pass_leaves_no_tap(data, monkeypatch):
    model = l4.random(RECIPE.config)
    rows = RECIPE.stages[0].lessons[0].draw(np.random.default_rng(0), data)
    monkeypatch.setattr(model, "hidden", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step.read(model, [rows])
    assert model.tap is NO_TAP


@pytest.mark.slow
def test_a_teacher_is_imitated_even_where_the_text_says_nothing(data, tmp_path):
    """With hard weight 0 the student learns the teacher's distribution, not the text."""
    teacher = loop.train(RECIPE, data, tmp_path / "teacher")
    recipe = dataclasses.replace(RECIPE, stages=(Stage(1.0, (Text(8, 1.0, "", DOMAINS, 24),)),))
    rows = [recipe.stages[0].lessons[0].draw(np.random.default_rng(0), data)]
    noise = [dataclasses.replace(rows[0], targets=torch.full_like(rows[0].targets, 3))]

    def distance(student):
        x = step.read(student, rows)[0][0]
        return step.divergence(teacher, student, rows[0], x).item()

    student = l4.random(recipe.config, seed=5).train()
    optimisers = step.make_optimisers(student, recipe)
    before = distance(student)
    for _ in range(30):
        step.update(
            student, optimisers, recipe.stages[0].lessons, noise, 0.0, step.Teacher(teacher), 0.0
        )
    assert distance(student) < before / 4
    assert distance(teacher) == pytest.approx(0, abs=0.01)


def test_the_hard_weight_follows_the_schedule_and_vocabularies_must_agree(data, tmp_path):
    teacher = step.Teacher(l4.random(RECIPE.config.replace(vocab_size=200)), (0.2, 0.6))
    assert [teacher.hard(done) for done in (0, 0.5, 1)] == pytest.approx([0.2, 0.4, 0.6])
    with pytest.raises(ValueError, match=r"has 200 tokens and the student 97: both must read"):
        loop.train(RECIPE, data, tmp_path, teacher=teacher)


def test_a_teacher_that_reads_other_tokens_is_refused(tmp_path):
    material = Material(tmp_path)
    shutil.copy(MODELS / "mini" / "tokenizer.json", tmp_path)
    np.arange(400, dtype="<u2").tofile(material.folder / "low.train.bin")
    config = RECIPE.config.replace(vocab_size=material.tokenizer.vocab_size)
    stages = (Stage(1.0, (Text(2, domains={"low": 1.0}, length=24),)),)
    recipe = dataclasses.replace(RECIPE, config=config, stages=stages, steps=1)
    teacher = l4.random(config).eval()
    teacher.tokenizer = Tokenizer.from_folder(MODELS / "mini")
    loop.train(recipe, material, tmp_path / "run", teacher=step.Teacher(teacher))
    teacher.tokenizer = dataclasses.replace(
        material.tokenizer,
        plain_bytes=lambda idx: material.tokenizer.plain_bytes(idx ^ 1 if idx >= 300 else idx),
    )
    with pytest.raises(ValueError) as raised:
        loop.train(recipe, material, tmp_path / "other", teacher=step.Teacher(teacher))
    assert str(raised.value) == (
        f"the teacher reads other tokens than {material.folder} is encoded with, from id 300 on: "
        f"give a teacher with the tokenizer of {material.folder}/tokenizer.json"
    )
    teacher.tokenizer = dataclasses.replace(material.tokenizer, vocab_size=4000)
    with pytest.raises(ValueError, match="from id 4000 on"):
        loop.train(recipe, material, tmp_path / "other", teacher=step.Teacher(teacher))


def test_a_state_of_another_model_is_refused(data, tmp_path):
    loop.train(dataclasses.replace(RECIPE, steps=1), data, tmp_path)
    other = dataclasses.replace(RECIPE, config=RECIPE.config.replace(hidden_size=64))
    with pytest.raises(ValueError, match="holds a model of other sizes than this recipe"):
        loop.train(other, data, tmp_path)


def test_a_diverged_run_stops_and_says_so(tmp_path):
    log = loop.Log(tmp_path / "log.csv", 0, ["step", "loss"])
    with pytest.raises(FloatingPointError, match="training diverged"):
        log.write(step=1, loss=float("nan"))


def test_a_log_keeps_the_rows_up_to_the_step_whichever_they_are(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n11,0.5\n12,0.4\n13,0.3\n1")  # begun late, and cut by a kill
    log = loop.Log(path, 12, ["step", "loss"])
    log.write(step=13, loss=0.2)
    log.close()
    assert path.read_text().split() == ["step,loss", "11,0.5", "12,0.4", "13,0.2"]


@pytest.mark.parametrize("name", ["balance", "warmup", "cooldown"])
def test_nothing_of_what_a_recipe_can_do_without_is_none_of_it(data, tmp_path, name):
    recipe = dataclasses.replace(RECIPE, steps=2, **{name: 0})
    loop.train(recipe, data, tmp_path)
    rates = [float(row["lr"]) for row in read_log(tmp_path)]
    assert rates == {"balance": [0.2, 0.4], "warmup": [1, 1], "cooldown": [0.2, 0.4]}[name]
    assert (step.balance_weight(recipe, 0.3) == 0) == (name == "balance")


def test_a_model_without_padding_counts_every_token(data):
    model = l4.random(RECIPE.config.replace(pad_token_id=None))
    rows = Text(2, domains=DOMAINS, length=20).draw(np.random.default_rng(0), data)
    assert [logits.shape for logits in step.read(model, [rows])[1]] == [(40, 5)] * 3


@pytest.mark.parametrize("shares", [{"low": 2.0, "high": -1.0}, {"low": 0.0}, {}])
def test_domains_without_a_share_are_refused(data, shares):
    with pytest.raises(ValueError, match="are no shares: give numbers from 0 up, and one above 0"):
        Text(2, domains=shares, length=8).draw(np.random.default_rng(0), data)


def test_batches_follow_the_weights_and_depend_on_the_generator_only(data):
    mixture = Mixture(data.folder, DOMAINS)
    rows = mixture.batch(np.random.default_rng(5), 8, 24)
    assert rows.shape == (8, 25)
    assert (rows.max(1) < 45).sum() == 6
    np.testing.assert_array_equal(rows, mixture.batch(np.random.default_rng(5), 8, 24))
    assert (rows != mixture.batch(np.random.default_rng(6), 8, 24)).any()
    with pytest.raises(
        ValueError, match=r"the domain '\w+' has [\d,]+ tokens, and a row takes 1,0"
    ):
        mixture.batch(np.random.default_rng(6), 8, 1_000_000)
    assert (np.diff(rows) == 1).mean() > 0.9


def test_stages_follow_each_other_by_their_shares():
    stages = [Stage(share, (), (str(i), 2.0)) for i, share in enumerate((1.0, 2.0, 1.0))]
    course = loop.Course(stages)
    entered = [stages.index(course.stage(done)) for done in (0, 0.24, 0.25, 0.74, 0.75, 0.99, 1)]
    assert entered == [0, 0, 1, 1, 2, 2, 2]


def test_a_stage_ends_early_when_its_goal_is_reached_also_after_a_restart():
    stages = [Stage(2.0, (), ("echo", 0.8)), Stage(1.0, ()), Stage(1.0, ())]
    course = loop.Course(stages)
    for _ in range(9):
        course.note({"echo_right": 1.0})
    assert course.stage(0.1) is stages[0]
    course.note({"echo_right": 0.0})
    resumed = loop.Course(stages)
    resumed.load_state_dict(course.state_dict())
    assert resumed.stage(0.2) is stages[1]
    assert resumed.stage(0.59) is stages[1]  # half of what was left
    assert resumed.stage(0.61) is stages[2]


def test_the_losses_of_a_step_do_not_depend_on_what_else_is_read(data):
    """Rows of one length go through the model together; padding and other rows change nothing."""
    model = l4.random(RECIPE.config)
    lessons = [Text(3, 1.0, label, DOMAINS, 20) for label in "abc"]
    drawn = [lesson.draw(np.random.default_rng(i), data) for i, lesson in enumerate(lessons)]
    pad = model.config.pad_token_id
    drawn[2] = padded([drawn[2]], pad, 32)
    hidden, routers = step.read(model, drawn)
    for rows, x in zip(drawn, hidden, strict=True):
        alone, _ = step.read(model, [rows])
        torch.testing.assert_close(x, alone[0], atol=0.05, rtol=0)  # maybe bfloat16
    assert [len(logits) for logits in routers] == [180] * 3


def test_rows_not_in_chunks_show_rope_layers_their_whole_past(data):
    model = l4.random(RECIPE.config)
    rows = Text(2, domains=DOMAINS, length=20).draw(np.random.default_rng(0), data)
    apart, together = (
        step.read(model, [dataclasses.replace(rows, in_chunks=is_cut)])[0][0]
        for is_cut in (True, False)
    )
    assert model.chunks == [model.config.attention_chunk(i) for i in range(len(model.layers))]
    context = model.config.max_position_embeddings
    wide = l4.random(RECIPE.config.replace(attention_chunk_size=context))
    wide.load_state_dict(model.state_dict())
    torch.testing.assert_close(together, step.read(wide, [rows])[0][0], atol=0.05, rtol=0)
    assert (apart - together).abs().max() > 0.1


@pytest.mark.parametrize("has_units", [True, False])
def test_products_are_in_bfloat16_only_where_the_cpu_has_units_for_it(monkeypatch, has_units):
    units = {"avx512_f": True, "avx512_bf16": has_units}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    cpu, expected = torch.device("cpu"), torch.bfloat16 if has_units else torch.float32
    x = torch.ones(2, 2)
    with mixed(cpu):
        assert (x @ x).dtype == product_dtype(cpu) == expected
    assert loop.backend_of(cpu) == ("padded" if has_units else "loop")
    assert product_dtype(torch.device("cuda")) == torch.bfloat16


def test_a_missing_domain_names_the_file_and_the_command(data):
    with pytest.raises(
        FileNotFoundError, match=r"none.train.bin is missing: build the corpus with"
    ):
        Mixture(data.folder, {"none": 1.0})
    with pytest.raises(FileNotFoundError, match=r"`llama4-lab corpus 'my texts'`$"):
        Mixture("my texts", {"none": 1.0})


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


def test_a_bias_fills_experts_evenly_and_is_gone_at_the_end(data):
    config = RECIPE.config.replace(num_local_experts=4)
    bias = Bias(config, 0.05, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    leaning = torch.tensor([2.0, 0.0, -1.0, -2.0])  # most tokens would choose the first expert
    routers = [torch.randn(400, 4, generator=generator) + leaning for _ in bias.value]

    def fullest(added):
        return max(
            (logits + own).argmax(-1).bincount(minlength=4).max() / 400
            for logits, own in zip(routers, added, strict=True)
        )

    assert fullest(bias.at(0.0)) > 0.7
    for _ in range(100):
        bias.adjust(routers, bias.at(0.2))
    assert fullest(bias.at(0.5)) < 0.3
    torch.testing.assert_close(bias.at(0.7), bias.value / 2)
    assert not bias.at(0.9).any()


def test_a_bias_chooses_experts_and_leaves_their_scores_as_they_are(data):
    model = l4.random(RECIPE.config)
    rows = Text(2, domains=DOMAINS, length=20).draw(np.random.default_rng(0), data)
    layers = sum(RECIPE.config.is_moe(i) for i in range(len(model.layers)))
    bias = torch.zeros(layers, RECIPE.config.num_local_experts)
    bias[:, 1] = 100.0
    seen = step.read(model, [rows], bias)[0][0]
    with l4.intervene(model, {"layers.*.router.indices": torch.ones_like}):
        expected = model.hidden(rows.inputs)
    torch.testing.assert_close(seen, expected, atol=0.05, rtol=0)  # maybe bfloat16
    assert (seen - step.read(model, [rows])[0][0]).abs().max() > 0.1


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
