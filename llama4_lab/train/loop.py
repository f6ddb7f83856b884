"""The training loop: batches in, a model out, resumable after a kill at any moment."""

import csv
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from llama4_lab.model import Llama4
from llama4_lab.model.random import random
from llama4_lab.points import NO_TAP
from llama4_lab.train.balance import RouterTap, switch_loss
from llama4_lab.train.mixture import Mixture
from llama4_lab.train.muon import Muon
from llama4_lab.train.recipes import Recipe

CHECKPOINT = "state.pt"


def train(
    recipe: Recipe,
    data: Mixture,
    folder: str | Path,
    *,
    budget_minutes: float | None = None,
    device: str = "cpu",
    compile: bool = False,
    save_minutes: float = 3.0,
    on_step: Callable[[int, Llama4], None] | None = None,
) -> Llama4:
    """Train the recipe's model, going on from `folder` if it holds an earlier state.

    Writes ``state.pt`` (model, optimisers, step) every `save_minutes` and at the end, each time to
    a temporary name that is then renamed, and one line a step to ``log.csv``. With
    `budget_minutes` the schedule follows the clock (minutes of all runs together) instead of the
    recipe's steps. Ctrl-C saves and returns what there is.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = random(recipe.config, recipe.seed, device=device).train()
    optimisers = make_optimisers(model, recipe)
    step, seconds = restore(folder, model, optimisers)
    forward = torch.compile(loss_of) if compile else loss_of
    if compile:
        torch._dynamo.config.recompile_limit = 64
        for layer in model.layers:
            layer.compile()
    total = recipe.steps if budget_minutes is None else None
    bar = tqdm(total=total, initial=step, desc=f"train {recipe.name}", unit="step", smoothing=0.1)
    saved = time.monotonic()
    log = Log(folder / "log.csv", step)
    try:
        # The fused CPU kernel has a slow backward pass at chunk length; plain products do better.
        with sdpa_kernel(SDPBackend.MATH), bar:
            while True:
                done = (
                    step / recipe.steps if budget_minutes is None else seconds / 60 / budget_minutes
                )
                if done >= 1:
                    break
                begin = time.monotonic()
                scale = set_learning_rate(optimisers, recipe, step, done)
                rows = data.batch(recipe.seed, step, recipe.rows, recipe.length).to(device)
                losses = update(model, optimisers, rows, balance_weight(recipe, done), forward)
                step, seconds = step + 1, seconds + time.monotonic() - begin
                tokens = step * recipe.rows * recipe.length
                log.write(step=step, seconds=round(seconds, 1), tokens=tokens, lr=scale, **losses)
                bar.set_postfix(loss=f"{losses['loss']:.3f}", tokens=f"{tokens / 1e6:.2f}M")
                bar.update()
                if time.monotonic() - saved > 60 * save_minutes:
                    save_state(folder, model, optimisers, step, seconds)
                    saved = time.monotonic()
                if on_step is not None:
                    on_step(step, model)
    except KeyboardInterrupt:
        tqdm.write(f"interrupted after step {step}; the state is kept in {folder}")
    finally:
        log.close()
    save_state(folder, model, optimisers, step, seconds)
    return model.eval()


def update(
    model, optimisers, rows: Int[Tensor, "rows tokens"], weight: float, forward
) -> dict[str, float]:
    """Run one optimiser step and return its losses, in nats per token."""
    tap = model.tap = RouterTap()
    with torch.autocast(rows.device.type, torch.bfloat16):
        x = model.hidden(rows[:, :-1])
    model.tap = NO_TAP
    loss = forward(x, model.lm_head.weight, rows[:, 1:])
    balance = torch.stack(
        [switch_loss(logits, model.config.num_experts_per_tok) for logits in tap.take()]
    )
    (loss + weight * balance.sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return {
        "loss": round(loss.item(), 4),
        "balance": round(balance.mean().item(), 4),
        "grad_norm": round(norm.item(), 3),
    }


def loss_of(
    x: Float[Tensor, "b t d"], head: Float[Tensor, "v d"], targets: Int[Tensor, "b t"]
) -> Tensor:
    """Return the mean cross-entropy of the read-out, in nats per token."""
    logits = (x.bfloat16() @ head.bfloat16().mT).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimisers(model: Llama4, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embeddings, routers and norms."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = "layers." in name and parameter.ndim >= 2 and "router" not in name
        (matrices if inner else rest).append(parameter)
    adam = torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    optimisers: list[torch.optim.Optimizer] = [Muon(matrices, lr=recipe.matrix_lr), adam]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return optimisers


def set_learning_rate(optimisers, recipe: Recipe, step: int, done: float) -> float:
    """Warm up, hold, cool down; `done` is the share of the run that is over."""
    scale = min(1.0, (step + 1) / recipe.warmup, (1 - done) / recipe.cooldown)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * scale
    return round(scale, 4)


def balance_weight(recipe: Recipe, done: float) -> float:
    """Return the weight of the balancing loss when the share `done` of the run is over."""
    return recipe.balance * (recipe.balance_end / recipe.balance) ** min(1.0, 2 * done)


def save_state(folder: Path, model: Llama4, optimisers, step: int, seconds: float) -> None:
    state = {
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, folder / (CHECKPOINT + ".tmp"))
    os.replace(folder / (CHECKPOINT + ".tmp"), folder / CHECKPOINT)


def restore(folder: Path, model: Llama4, optimisers) -> tuple[int, float]:
    """Load the state of an earlier run, if there is one; return its step and seconds."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location=model.device, weights_only=True)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds a model of other sizes than this recipe; "
            "choose another folder or remove it"
        ) from error
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return state["step"], state["seconds"]


class Log:
    """Appends one row a step to a CSV file, after the first `step` rows of an earlier run."""

    def __init__(self, path: Path, step: int):
        kept = path.read_text().splitlines(keepends=True)[: step + 1] if path.exists() else []
        path.write_text("".join(kept))  # steps behind the restored state will be done again
        self._new = not kept
        self._file = path.open("a", newline="")
        self._writer: csv.DictWriter | None = None

    def write(self, **row: int | float) -> None:
        if any(isinstance(value, float) and not math.isfinite(value) for value in row.values()):
            raise FloatingPointError(f"training diverged: {row}")
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(row))
            if self._new:
                self._writer.writeheader()
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()
