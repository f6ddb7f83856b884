"""What a model can do, in numbers: needles, sums, pictures and long texts it was not trained on.

An answer is right if the model, always taking the likeliest token, says exactly that and then ends
its turn. One pass over question and answer shows it: each token must be the likeliest one.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from llama4_lab.edits import Chunk, edited
from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt
from llama4_lab.train import arithmetic, needles, scenes
from llama4_lab.train.lessons import Material, chat
from llama4_lab.train.rows import Rows, padded, shifted

SEED = 2**32
# NumPy reads (SEED, k) as (0, 1, k), with which a recipe of seed 0 draws lesson k of its second
# step. The shipped recipes' first steps have one lesson, of text: nothing asked here was taught.
LONGEST = 512  # tokens of a question and its answer
DISTANCES = ((1, 250), (251, 500), (501, 1000), (1001, 1500))  # tokens


@torch.no_grad()
def is_likeliest(model: Llama4, rows: Rows) -> Bool[Tensor, "b t"]:
    """Say of each position whether its target is the model's likeliest token; True if unscored."""
    x = model.hidden(rows.inputs, rows.pixel_values)
    scored = rows.weights > 0
    right = torch.ones_like(scored)
    right[scored] = model.lm_head(x[scored]).argmax(-1) == rows.targets[scored]
    return right


def right_answers(
    model: Llama4, rows: Sequence[Rows], batch_size: int = 16
) -> Bool[np.ndarray, " n"]:
    """Say of each row whether all its scored tokens are the likeliest ones."""
    pad = model.config.pad_token_id or 0
    order = sorted(range(len(rows)), key=lambda i: rows[i].inputs.shape[1])
    right = np.zeros(len(rows), bool)
    for start in range(0, len(rows), batch_size):
        some = order[start : start + batch_size]
        batch = padded([rows[i] for i in some], pad)
        right[some] = is_likeliest(model, batch).all(dim=1).cpu().numpy()
    return right


def recall(model: Llama4, hay: needles.Fill, count: int, chunk: int) -> dict[str, float]:
    """Hide five codes in each of some texts, ask for three of them, and count right answers.

    Returns their share among some `count`, where code and question stand in one chunk and where
    they stand in two, by distance.
    """
    encode, rng = model.tokenizer.encode, np.random.default_rng((SEED, 0))

    def share(length: int, distance: tuple[int, int] | None) -> float:
        found = []
        while len(found) < count:
            facts = needles.word_facts(rng, encode, 5)
            across = distance is not None
            row = needles.plant(
                rng, facts, hay, length, asked=3, distance=distance, across=across, chunk=chunk
            )
            right = is_likeliest(model, shifted(row.tokens[None], row.weights[None]))[0]
            found += [bool(right[a.start - 1 : a.stop].all()) for a in row.answers]
        return float(np.mean(found))

    far = {f"{low} to {high}": share(high + 100, (low, high)) for low, high in DISTANCES}
    return {"same chunk": share(chunk, None)} | far


def chunk_of(model: Llama4) -> int:
    """Return the tokens in a chunk; all of the context if the model does not cut it."""
    return model.config.attention_chunk_size or model.config.max_position_embeddings


def recalls(model: Llama4, hay: needles.Fill, count: int) -> dict[str, dict[str, float]]:
    """Measure recall as trained, with NoPE layers that see only their chunk, and without chunks."""
    chunk, layers = chunk_of(model), range(model.config.num_hidden_layers)
    uses_rope, found = model.config.uses_rope, {}
    for what, changes in (
        ("as trained", []),
        ("NoPE layers see one chunk", [Chunk(i, chunk) for i in layers if not uses_rope(i)]),
        ("RoPE layers see all", [Chunk(i, None) for i in layers if uses_rope(i)]),
    ):
        with edited(model, changes):
            found[what] = recall(model, hay, count, chunk)
    where = found["as trained"]
    return {place: {name: row[place] for name, row in found.items()} for place in where}


def seeing(model: Llama4, count: int) -> dict[str, dict[str, float]]:
    """Ask about scenes of one to four objects, each question by itself, `count` times a task.

    Returns shares by task: "right" answers; "changed", those of them that are no longer given when
    the asked object is painted out (left out where none can tell); "kept", right answers when
    another object is painted out. Pictures of two and four tiles are asked about with all tasks in
    turn.
    """
    material = Material(model.tokenizer.file.parent, model.config.vision_config)
    rng = np.random.default_rng((SEED, 1))
    found: dict[str, dict[str, float]] = {}
    for task in scenes.TASKS:
        examples = [scenes.sample(rng, task) for _ in range(count)]
        right = asked(model, material, examples)
        found[task] = {"right": float(right.mean())}
        if task in ("scan", "caption"):
            continue
        told = zip(examples, right, strict=True)
        if there := [
            (example, example.asked) for example, is_right in told if is_right and example.asked
        ]:
            found[task]["changed"] = 1 - painted_out(model, material, there)
        others = [(example, other) for example in examples if (other := not_asked(example))]
        found[task]["kept"] = painted_out(model, material, others)
    for name, tiles in (("two tiles", ((1, 2), (2, 1))), ("four tiles", ((2, 2),))):
        tasks = itertools.islice(itertools.cycle(scenes.ONE_PICTURE), count)
        worlds = itertools.cycle(scenes.World(tiles=shape) for shape in tiles)
        examples = [scenes.sample(rng, *wish) for wish in zip(tasks, worlds, strict=False)]
        found[name] = {"right": float(asked(model, material, examples).mean())}
    return found


def painted_out(
    model: Llama4,
    material: Material,
    pairs: Sequence[tuple[scenes.Example, Sequence[tuple[int, int]]]],
) -> float:
    """Return how often the answer stays when the objects with an example are painted out."""
    answers = [example.answer for example, _ in pairs]
    shown = [example.paint_out(gone) for example, gone in pairs]
    return float(asked(model, material, shown, answers).mean())


def asked(
    model: Llama4,
    material: Material,
    examples: Sequence[scenes.Example],
    answers: Sequence[str] | None = None,
) -> Bool[np.ndarray, " examples"]:
    """Tell which examples are answered so; by default, rightly."""
    if answers is None:
        answers = [example.answer for example in examples]
    rows = [
        chat(material, example.images, [(example.question, answer)], LONGEST)[0]
        for example, answer in zip(examples, answers, strict=True)
    ]
    return right_answers(model, rows)


def not_asked(example: scenes.Example) -> list[tuple[int, int]]:
    """The first object that the question is not about, if there is one."""
    things = ((p, i) for p, scene in enumerate(example.scenes) for i in range(len(scene.objects)))
    return [pair for pair in things if pair not in example.asked][:1]


def reckoning(model: Llama4, count: int) -> dict[str, float]:
    """Return the share of right answers to held-out sums, asked in a chat, by kind."""
    material = Material(model.tokenizer.file.parent, model.config.vision_config)
    rng = np.random.default_rng((SEED, 2))
    found = {}
    for kind in arithmetic.KINDS:
        problems = [arithmetic.sample(rng, kind, "test") for _ in range(count)]
        rows = [chat(material, [], [(p.question, p.answer)], LONGEST)[0] for p in problems]
        found[kind] = float(right_answers(model, rows).mean())
    return found


def recited(model: Llama4, tokens: Integer[np.ndarray, " n"], count: int, span: int = 50) -> float:
    """Return how often the model goes on with a text of its training word for word.

    It is given `span` tokens from `count` places of the text, and must say the next `span`.
    """
    if len(tokens) < 2 * span:
        raise ValueError(
            f"a text of {len(tokens)} tokens is too short to recite {span} after {span}: "
            "give a longer text or a shorter span"
        )
    rng = np.random.default_rng((SEED, 4))
    starts = rng.integers(0, len(tokens) - 2 * span + 1, size=count)
    known = np.arange(2 * span) >= span
    rows = [
        shifted(tokens[None, start : start + 2 * span], known[None].astype(np.float32))
        for start in starts
    ]
    return float(right_answers(model, rows).mean())


@torch.no_grad()
def loss_by_position(
    model: Llama4, rows: Int[Tensor, "rows t"], edges: Sequence[int]
) -> list[float]:
    """Return the mean loss in nats a token between each two of the positions `edges`."""
    losses = []
    for ids in rows.split(1):
        logits = model(ids[:, :-1]).float()
        losses.append(F.cross_entropy(logits[0], ids[0, 1:], reduction="none"))
    loss = torch.stack(losses).mean(dim=0)
    return [loss[a:b].mean().item() for a, b in itertools.pairwise(edges)]


def image_tokens(model: Llama4, count: int) -> list[tuple[Prompt, Bool[Tensor, "1 t"]]]:
    """Return prompts with one picture each, and which of their tokens are the picture's."""
    rng = np.random.default_rng((SEED, 3))
    prompts = [
        model.prompt("", images=[scenes.sample(rng, "caption").images[0]]) for _ in range(count)
    ]
    return [(prompt, prompt.spans.patch >= 0) for prompt in prompts]
