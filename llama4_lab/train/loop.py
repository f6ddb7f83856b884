"""The training loop: batches in, a model out, resumable after a kill at any moment."""

import csv
import dataclasses
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from llama4_lab.model import Llama4
from llama4_lab.model.random import random
from llama4_lab.precision import product_dtype
from llama4_lab.train.balance import Bias
from llama4_lab.train.lessons import Material
from llama4_lab.train.patches import teach_patches
from llama4_lab.train.recipes import Recipe, Stage
from llama4_lab.train.step import (
    Teacher,
    balance_weight,
    make_optimisers,
    set_learning_rate,
    update,
)

CHECKPOINT = "state.pt"


def train(
    recipe: Recipe,
    material: Material,
    folder: str | Path,
    *,
    budget_minutes: float | None = None,
    device: str = "cpu",
    compile: bool = False,
    save_minutes: float = 3.0,
    teacher: Teacher | None = None,
    tensorboard: bool = False,
    on_step: Callable[[int, Llama4], None] | None = None,
) -> Llama4:
    """Train the recipe's model, going on from `folder` if it holds an earlier state.

    Writes ``state.pt`` (model, optimisers, step) every `save_minutes` and at the end, each time to
    a temporary name that is then renamed, and one line a step to ``log.csv``; with `tensorboard`
    the same curves as events that TensorBoard shows. With `budget_minutes` the schedule follows
    the clock (minutes of all runs together) instead of the recipe's steps. Ctrl-C or a SIGTERM
    ends the step under way, saves and raises KeyboardInterrupt; a second one breaks off at once,
    and leaves what was saved before, as the first does while the vision encoder is taught.

    Raises:
        KeyboardInterrupt: it was interrupted; the same call goes on.
        RuntimeError: `tensorboard` is asked for and not installed.
        ValueError: a teacher with another vocabulary, or a damaged state or one of another recipe
            in `folder`; only the number of steps or minutes may differ.
        FileNotFoundError: the material lacks what a lesson needs.
        FloatingPointError: the loss is no longer a number; the last saved state is kept.
    """
    folder = Path(folder)
    if tensorboard and find_spec("tensorboard") is None:
        raise RuntimeError('TensorBoard is not installed: pip install "llama4-lab[tensorboard]"')
    for stage in recipe.stages:
        for lesson in stage.lessons:  # what is missing shows now, not in hours
            lesson.draw(np.random.default_rng(0), material)
    if teacher is not None:
        check_teacher(teacher, recipe, material)
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(int(recipe.steps), None if budget_minutes is None else float(budget_minutes))
    state = State.begin(folder / CHECKPOINT, recipe, plan, device)
    model = state.model
    is_new = not state.path.exists()
    step, tokens, seconds = state.restore()
    if is_new and recipe.config.vision_config is not None:
        begin = time.monotonic()
        teach_patches(model, recipe.vision_steps, recipe.seed)
        seconds += time.monotonic() - begin
    if compile:
        torch._dynamo.config.recompile_limit = 64
        for layer in model.layers:
            layer.compile()
    total = recipe.steps if budget_minutes is None else None
    bar = tqdm(total=total, initial=step, desc=f"train {recipe.name}", unit="step", smoothing=0.1)
    saved = time.monotonic()
    log = Log(folder / "log.csv", step, columns(recipe), tensorboard=tensorboard)
    try:
        with bar, stops_between_steps() as asked:
            while not asked.is_set():
                done = plan.done(step, seconds)
                if done >= 1:
                    break
                begin = time.monotonic()
                found, num_read = learn(state, material, teacher, step, done)
                step, seconds = step + 1, seconds + time.monotonic() - begin
                tokens += num_read
                log.write(step=step, seconds=round(seconds, 1), tokens=tokens, **found)
                bar.set_postfix(loss=f"{found['loss']:.3f}", tokens=f"{tokens / 1e6:.2f}M")
                bar.update()
                if time.monotonic() - saved > 60 * save_minutes:
                    state.save(step, tokens, seconds)
                    saved = time.monotonic()
                if on_step is not None:
                    on_step(step, model)
    finally:
        log.close()
    state.save(step, tokens, seconds)
    if asked.is_set():
        raise KeyboardInterrupt(f"the state after step {step} is kept in {folder}")
    model.backend = "auto"
    return model.eval()


def learn(
    state: "State", material: Material, teacher: Teacher | None, step: int, done: float
) -> tuple[dict[str, float], int]:
    """Take a step when the share `done` of the run is over; `step` seeds what is drawn.

    Returns columns of the log (``lr``, and what `update` found) and how many tokens were read.
    """
    model, recipe, bias = state.model, state.recipe, state.bias
    scale = set_learning_rate(state.optimisers, recipe, step, done)
    lessons = state.course.stage(done).lessons
    drawn = [
        lesson.draw(np.random.default_rng((recipe.seed, step, i)), material).to(model.device)
        for i, lesson in enumerate(lessons)
    ]
    hard = 1.0 if teacher is None else teacher.hard(done)
    weight = balance_weight(recipe, done)
    added = bias.at(done) if bias.rate else None
    found, routers = update(model, state.optimisers, lessons, drawn, weight, teacher, hard, added)
    if added is not None:
        bias.adjust(routers, added)
    state.course.note(found)
    return {"lr": scale} | found, sum(rows.inputs.numel() for rows in drawn)


def check_teacher(teacher: Teacher, recipe: Recipe, material: Material) -> None:
    """Refuse a teacher that reads other tokens than the student.

    Raises:
        ValueError: another number of them, or the first one that differs.
    """
    if teacher.model.config.vocab_size != recipe.config.vocab_size:
        raise ValueError(
            f"the teacher has {teacher.model.config.vocab_size} tokens and the student "
            f"{recipe.config.vocab_size}: both must read the same ones"
        )
    if (tokenizer := teacher.model.tokenizer) is None:
        return
    ours = material.tokenizer
    sizes = tokenizer.vocab_size, ours.vocab_size
    other = (i for i in range(min(sizes)) if tokenizer.token_bytes(i) != ours.token_bytes(i))
    if (idx := next(other, None if len({*sizes}) == 1 else min(sizes))) is not None:
        raise ValueError(
            f"the teacher reads other tokens than {material.folder} is encoded with, from id {idx} "
            f"on: give a teacher with the tokenizer of {ours.file}"
        )


def backend_of(device: torch.device) -> str:
    """Return the experts' fastest backend with gradients."""
    if device.type != "cpu":
        return "auto"
    return "padded" if product_dtype(device) == torch.bfloat16 else "loop"


@contextmanager
def stops_between_steps() -> Iterator[threading.Event]:
    """Note a Ctrl-C or a SIGTERM, as a step that is cut in two leaves a state of neither.

    The second one interrupts at once. Threads other than the first hear of none.
    """
    asked = threading.Event()

    def note(_number: int, _frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Plan:
    """How long a run is: so many steps or, if given, minutes of all its parts together."""

    steps: int
    minutes: float | None = None

    def done(self, step: int, seconds: float) -> float:
        """Return the share of the run that is over."""
        return step / self.steps if self.minutes is None else seconds / 60 / self.minutes


class Course:
    """Which stage a run is in: each ends with its share of the time, or with its goal."""

    def __init__(self, stages: Sequence[Stage]):
        self.stages = stages
        self.index = 0
        self.steps = 0
        self.reached: dict[int, int] = {}  # stages that ended with their goal: after which step
        self.recent: list[float] = []  # shares of right guesses that the goal is about
        self.end = self._end(0.0)

    def stage(self, done: float) -> Stage:
        """Return the stage to be in when the share `done` of the run is over."""
        while self.index + 1 < len(self.stages):
            if self._is_reached():
                self.reached[self.index] = self.steps
            elif done < self.end:
                break
            self.index, self.recent = self.index + 1, []
            self.end = self._end(done)
        return self.stages[self.index]

    def note(self, found: dict[str, float]) -> None:
        """Take in what a step's lessons found."""
        self.steps += 1
        if (goal := self.stages[self.index].goal) is not None:
            self.recent = [*self.recent[-9:], found[goal[0] + "_right"]]

    def replan(self, plan: Plan, seconds: float) -> None:
        """Be where a run of this plan would be after as many steps, in as many seconds.

        A goal counts as reached after the step that reached it, if its stage would be taught then.
        """
        new = Course(self.stages)
        for step in range(self.steps):
            done = plan.done(step, seconds * step / self.steps)
            new.stage(done)
            if self.reached.get(new.index) == step:
                new.recent = [math.inf] * 10
                new.stage(done)
            new.steps = step + 1
        if new.index == self.index:
            new.recent = self.recent
        new.reached = self.reached | new.reached
        self.load_state_dict(new.state_dict())

    def _end(self, done: float) -> float:
        left = sum(stage.share for stage in self.stages[self.index :])
        return done + (1 - done) * self.stages[self.index].share / left

    def _is_reached(self) -> bool:
        goal = self.stages[self.index].goal
        return goal is not None and len(self.recent) == 10 and sum(self.recent) >= 10 * goal[1]

    def state_dict(self) -> dict[str, object]:
        names = ("index", "recent", "end", "steps", "reached")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        self.index, self.recent, self.end = state["index"], state["recent"], state["end"]
        self.steps, self.reached = state["steps"], state.get("reached", {})


def columns(recipe: Recipe) -> list[str]:
    """Name the columns of a run's log; a lesson's are empty in stages that leave it out."""
    names = dict.fromkeys(lesson.name for stage in recipe.stages for lesson in stage.lessons)
    each = [column for name in names for column in (name, name + "_right")]
    return ["step", "seconds", "tokens", "lr", "loss", *each, "balance", "grad_norm"]


def settings(recipe: Recipe) -> dict[str, str]:
    """Return what must stay as it is when a run goes on."""
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return {name: repr(value) for name, value in values.items() if name not in ("steps", "minutes")}


@dataclass(frozen=True)
class State:
    """What goes on when a run does, and the file that it is kept in."""

    path: Path
    model: Llama4
    optimisers: list[torch.optim.Optimizer]
    course: Course
    bias: Bias
    recipe: Recipe
    plan: Plan

    @classmethod
    def begin(cls, path: Path, recipe: Recipe, plan: Plan, device: str) -> "State":
        """Return the state before the first step."""
        model = random(recipe.config, recipe.seed, device=device).train()
        model.backend = backend_of(model.device)
        with torch.no_grad():
            model.embed_tokens.weight.mul_(recipe.embed_std)
        optimisers, course = make_optimisers(model, recipe), Course(recipe.stages)
        bias = Bias(recipe.config, recipe.bias_rate, model.device)
        return cls(path, model, optimisers, course, bias, recipe, plan)

    def save(self, step: int, tokens: int, seconds: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "course": self.course.state_dict(),
            "bias": self.bias.value,
            "recipe": settings(self.recipe),
            "plan": dataclasses.astuple(self.plan),
            "step": step,
            "tokens": tokens,
            "seconds": seconds,
        }
        new = self.path.with_name(self.path.name + ".tmp")
        torch.save(state, new)
        os.replace(new, self.path)

    def restore(self) -> tuple[int, int, float]:
        """Load the state of an earlier run, if there is one; return its step, tokens and seconds.

        Raises:
            ValueError: a file that is damaged, no such state, or of another recipe.
        """
        path = self.path
        if not path.exists():
            return 0, 0, 0.0
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
        except (PermissionError, torch.OutOfMemoryError):
            raise  # the file may be whole
        except (EOFError, KeyError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is damaged: remove it to start again") from error
        parts = {"model", "optimisers", "course", "step", "tokens", "seconds"}
        if not isinstance(state, dict) or not parts <= state.keys():
            raise ValueError(
                f"{path} is no state of a training run; choose another folder or remove it"
            )
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(
                f"{path} holds a model of other sizes than this recipe; "
                "choose another folder or remove it"
            ) from error
        # States of before have neither a recipe nor a plan, and no bias.
        now = settings(self.recipe)
        before = state.get("recipe", now)
        if changed := [name for name in now if before.get(name, now[name]) != now[name]]:
            raise ValueError(
                f"{path} was trained by a recipe with other settings ({', '.join(changed)}); "
                "choose another folder or remove it"
            )
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.course.load_state_dict({"steps": state["step"]} | state["course"])
        plan = dataclasses.astuple(self.plan)
        if state.get("plan", plan) != plan:
            self.course.replan(self.plan, state["seconds"])
        self.bias.value = state.get("bias", self.bias.value)
        return state["step"], state["tokens"], state["seconds"]


class Log:
    """Appends one row a step to a CSV file, after those of an earlier run up to `step`.

    With `tensorboard`, each column is also written as a curve to events in the same folder.
    """

    def __init__(self, path: Path, step: int, columns: Sequence[str], *, tensorboard: bool = False):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        # Steps behind the restored state will be done again; a kill may have cut the last row.
        steps = [line.split(",", 1)[0] if line.endswith("\n") else "" for line in lines]
        rows = zip(lines[1:], steps[1:], strict=True)
        kept = lines[:1] + [row for row, at in rows if at.isdecimal() and int(at) <= step]
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        if not kept:
            self._writer.writeheader()
        self._curves = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import

            self._curves = SummaryWriter(path.parent, purge_step=step + 1)

    def write(self, **row: int | float) -> None:
        if not all(math.isfinite(value) for value in row.values()):
            raise FloatingPointError(f"training diverged: {row}")
        self._writer.writerow(row)
        self._file.flush()
        if self._curves is not None:
            for name in row.keys() - {"step"}:
                self._curves.add_scalar(name, row[name], int(row["step"]))

    def close(self) -> None:
        self._file.close()
        if self._curves is not None:
            self._curves.close()
