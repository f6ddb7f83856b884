"""One step of training: the rows of all lessons in, an update of the weights out.

The optimisers and their schedules are here, too. Read `llama4_lab.train.loop` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama4_lab.edits import Chunk, ruled
from llama4_lab.model import Llama4
from llama4_lab.points import NO_TAP
from llama4_lab.precision import mixed
from llama4_lab.train.balance import RouterTap, switch_loss
from llama4_lab.train.lessons import Lesson, Text
from llama4_lab.train.muon import Muon
from llama4_lab.train.recipes import Recipe
from llama4_lab.train.rows import Rows


@dataclass(frozen=True)
class Teacher:
    """A model of the same vocabulary whose predictions of text are learnt beside the text itself.

    The true next token counts `hard` and the teacher's distribution the rest, as in the
    co-distillation of Llama 4 from Behemoth; `schedule` gives `hard` at both ends.
    """

    model: Llama4
    schedule: tuple[float, float] = (0.3, 0.9)

    def hard(self, done: float) -> float:
        """Return the weight of the true token when the share `done` of the run is over."""
        begin, end = self.schedule
        return begin + done * (end - begin)


def update(
    model: Llama4,
    optimisers: list[torch.optim.Optimizer],
    lessons: Sequence[Lesson],
    drawn: Sequence[Rows],
    balance_weight: float,
    teacher: Teacher | None = None,
    hard: float = 1.0,
    bias: Float[Tensor, "l e"] | None = None,
) -> tuple[dict[str, float], list[Float[Tensor, "n e"]]]:
    """Run one optimiser step; return losses (nats a scored token) and shares of right guesses,
    and each MoE layer's router logits, to which `bias` was added when experts were chosen.

    With a teacher, the loss of text counts `hard` times and the divergence from the teacher
    ``1 - hard`` times; what is returned is the loss without the teacher.
    """
    hidden, routers = read(model, drawn, bias)
    share = sum(lesson.weight for lesson in lessons)
    found, total = {}, torch.zeros((), device=model.device)
    for lesson, rows, x in zip(lessons, drawn, hidden, strict=True):
        loss, right = loss_of(x, model.lm_head.weight, rows)
        if teacher is not None and isinstance(lesson, Text):
            soft = divergence(teacher.model, model, rows, x)
            total = total + lesson.weight / share * (hard * loss + (1 - hard) * soft)
        else:
            total = total + lesson.weight / share * loss
        found[lesson.name] = loss.item()
        found[lesson.name + "_right"] = right.item()
    topk = model.config.num_experts_per_tok
    balance = torch.stack([switch_loss(logits, topk) for logits in routers])
    (total + balance_weight * balance.sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    found |= {"loss": total.item(), "balance": balance.mean().item(), "grad_norm": norm.item()}
    return {name: round(value, 4) for name, value in found.items()}, routers


def read(
    model: Llama4, drawn: Sequence[Rows], bias: Float[Tensor, "l e"] | None = None
) -> tuple[list[Float[Tensor, "_ t d"]], list[Float[Tensor, "n e"]]]:
    """Run all rows; return what the read-out sees, and each layer's router logits without padding.

    Rows of one length, seen alike, go through the model together.
    """
    hidden: dict[int, Tensor] = {}
    routers = []
    whole = [Chunk(i, None) for i in range(len(model.layers))]  # what rows not in chunks see
    kinds = [(rows.inputs.shape[1], rows.in_chunks) for rows in drawn]
    for kind in sorted(set(kinds)):
        together = [i for i, own in enumerate(kinds) if own == kind]
        inputs = torch.cat([drawn[i].inputs for i in together])
        pixels = [x for i in together if (x := drawn[i].pixel_values) is not None]
        tap = model.tap = RouterTap(bias)
        try:
            with mixed(inputs.device), ruled(model, [] if kind[1] else whole):
                x = model.hidden(inputs, torch.cat(pixels) if pixels else None)
        finally:
            model.tap = NO_TAP
        pad = model.config.pad_token_id
        is_real = torch.ones_like(inputs, dtype=torch.bool) if pad is None else inputs != pad
        routers.append([logits[is_real] for logits in tap.take()])
        sizes = [len(drawn[i].inputs) for i in together]
        hidden |= dict(zip(together, x.split(sizes), strict=True))
    return (
        [hidden[i] for i in range(len(drawn))],
        [torch.cat(layer) for layer in zip(*routers, strict=True)],
    )


def loss_of(
    x: Float[Tensor, "b t d"], head: Float[Tensor, "v d"], rows: Rows
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the weighted mean cross-entropy in nats, and the weighted share of right guesses."""
    scored = rows.weights > 0
    weights, targets = rows.weights[scored] / rows.weights.sum(), rows.targets[scored]
    with mixed(x.device):
        logits = F.linear(x[scored], head).float()
    loss = F.cross_entropy(logits, targets, reduction="none") @ weights
    return loss, (logits.argmax(-1) == targets).float() @ weights


def divergence(
    teacher: Llama4, student: Llama4, rows: Rows, x: Float[Tensor, "b t d"]
) -> Float[Tensor, ""]:
    """Return the mean Kullback-Leibler divergence of the student from the teacher, in nats."""
    with mixed(x.device):
        with torch.no_grad():
            taught = teacher(rows.inputs).float().log_softmax(dim=-1)
        said = student.lm_head(x).float().log_softmax(dim=-1)
    apart = F.kl_div(said, taught, reduction="none", log_target=True).sum(dim=-1)
    return (apart * rows.weights).sum() / rows.weights.sum()


def make_optimisers(model: Llama4, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embeddings, read-out, routers and norms.

    Embeddings meet a gradient only where their token is read: they take larger steps and begin
    small, or words of one kind would not come to lie together, and the first routers, which see
    little else, could not tell the kinds apart.
    """
    matrices, vision, rest = [], [], []
    for name, parameter in model.named_parameters():
        inner = ("layers." in name or "mlp" in name) and parameter.ndim >= 2
        if name == "embed_tokens.weight":
            continue
        if not inner or "router" in name:
            rest.append(parameter)
        else:
            (vision if name.startswith("vision_model") else matrices).append(parameter)
    groups = [
        {"params": rest, "lr": recipe.adam_lr},
        {"params": [model.embed_tokens.weight], "lr": recipe.embed_lr},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    muon = Muon([{"params": matrices, "lr": recipe.matrix_lr}])
    if vision:
        muon.add_param_group({"params": vision, "lr": recipe.vision_lr})
    optimisers: list[torch.optim.Optimizer] = [muon, adam]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return optimisers


def set_learning_rate(optimisers, recipe: Recipe, step: int, done: float) -> float:
    """Warm up, hold, cool down; `done` is the share of the run that is over."""
    warm = (step + 1) / recipe.warmup if recipe.warmup else 1.0
    cool = (1 - done) / recipe.cooldown if recipe.cooldown else 1.0
    scale = min(1.0, warm, cool)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * scale
    return round(scale, 4)


def balance_weight(recipe: Recipe, done: float) -> float:
    """Return the weight of the balancing loss when the share `done` of the run is over."""
    if not recipe.balance:
        return 0.0
    return recipe.balance * (recipe.balance_end / recipe.balance) ** min(1.0, 2 * done)
