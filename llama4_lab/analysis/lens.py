"""What the model would say if it stopped early: the logit lens at every point of the stream.

The final norm divides a vector by its own root mean square and multiplies by its weight; the
read-out then turns it into logits. Put on an earlier point, that shows its direction in the final
basis, whatever its length: early streams, which are shorter, are read as loudly as the last one.
`llama4_lab.analysis.decomposition` says which parts of the model wrote what is read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.analysis.positions import from_start, refuse_words
from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt, tokens_of
from llama4_lab.replay import divergence
from llama4_lab.trace import match, trace

_LOGITS_AT_ONCE = 2**25  # 128 MB of float32


@dataclass(frozen=True, eq=False)
class Lens:
    """Next-token distributions of `points` (axis l) at `positions` (axis t), in short.

    Log-probabilities and divergences are in nats. A target is a token whose fate is followed.
    """

    points: list[str]
    positions: Int[np.ndarray, " t"]
    target: Int[np.ndarray, " t"]
    top_token: Int[np.ndarray, "l t top"]  # likeliest first
    top_logprob: Float[np.ndarray, "l t top"]
    target_rank: Int[np.ndarray, "l t"]  # how many tokens are likelier
    target_logprob: Float[np.ndarray, "l t"]
    kl: Float[np.ndarray, "l t"]  # from the point's distribution to the model's: KL(model ‖ point)
    logprobs: Float[np.ndarray, "l t v"] | None = None


@torch.inference_mode()
def logit_lens(
    model: Llama4,
    prompt: Prompt,
    positions: int | Sequence[int] | None = None,
    *,
    target: int | Sequence[int] | None = None,
    points: str | Iterable[str] | None = None,
    top: int = 5,
    keep_logprobs: bool = False,
    kept: Mapping[str, Tensor] | None = None,
) -> Lens:
    """Read points of the residual stream through the final norm and the read-out, in one pass.

    Of the whole vocabulary only a few positions are held at a time, so memory is that of the
    watched stream. The lens is nostalgebraist's ("interpreting GPT: the logit lens", 2020); the
    divergence is the one that Belrose et al. 2023 measure lenses with.

    Args:
        positions: where to read, one or several; -1 is the last token, None all of them.
        target: a token id for all positions or one for each; None is what the model says there.
        points: names or patterns; None is the embedding and both halves of every layer (a layer's
            `resid_pre` is the `resid_post` before it).
        top: how many tokens of each distribution to keep.
        keep_logprobs: keep all distributions too, ``points * positions * vocabulary`` numbers.
        kept: of `llama4_lab.analysis.decomposition.written`, in place of a pass; it has no
            `resid_pre`.

    Raises:
        ValueError: a prompt of several rows; a position, token, point or `top` out of range.
    """
    config = model.config
    length = len(tokens_of(prompt))
    if positions is None:
        positions = range(length)
    elif isinstance(positions, int):
        positions = [positions]
    places = torch.tensor([position_in(prompt, p) for p in positions], device=model.device).long()
    names = _stream_points(config, points)
    if not 1 <= top <= config.vocab_size:
        raise ValueError(f"top {top} is out of range: choose 1 to {config.vocab_size}")
    cache = kept or run(model, prompt, [*names, "final_norm"])

    def logprobs(x: Float[Tensor, "t d"]) -> Float[Tensor, "t v"]:
        return model.lm_head(x).float().log_softmax(dim=-1)

    def said(where: Int[Tensor, " t"]) -> Float[Tensor, "t v"]:
        if (altered := cache.get("logits")) is not None:
            return altered[0, where].float().log_softmax(dim=-1)
        return logprobs(cache["final_norm"][0, where])

    def read(
        name: str, where: Int[Tensor, " t"], final: Float[Tensor, "t v"], goal: Int[Tensor, " t"]
    ) -> list[Tensor]:
        lens = logprobs(model.norm(cache[name][0, where]))
        best = lens.topk(top)
        aimed = lens.gather(-1, goal[:, None])
        rank = (lens > aimed).sum(dim=-1)
        kl = divergence(lens, final)
        kept = [best.indices, best.values, rank, aimed[:, 0], kl]
        return [x.cpu() for x in ([*kept, lens] if keep_logprobs else kept)]

    goals = _targets(target, len(places), config.vocab_size)
    blocks = []
    for block in torch.arange(len(places)).split(max(1, _LOGITS_AT_ONCE // config.vocab_size)):
        final = said(places[block])
        goal = final.argmax(dim=-1) if goals is None else goals[block].to(model.device)
        rows = [read(name, places[block], final, goal) for name in names]
        blocks.append([goal.cpu()[None], *(torch.stack(x) for x in zip(*rows, strict=True))])
    goal, *arrays = (torch.cat(x, dim=1).numpy() for x in zip(*blocks, strict=True))
    return Lens(names, places.cpu().numpy(), goal[0], *arrays)


def run(model: Llama4, prompt: Prompt, names: Iterable[str]) -> dict[str, Tensor]:
    """Run a prompt and keep the named values; the logits, too, if they are what edits change."""
    prompt = prompt.to(model.device)
    altered = ["logits"] if model.tap.alters("logits") else []
    with trace(model, [*names, *altered]) as cache:
        (model if altered else model.hidden)(
            prompt.input_ids, prompt.pixel_values, prompt.attention_mask
        )
    return cache


def position_in(prompt: Prompt, position: int) -> int:
    """Return a position of a prompt of one row, counted from its start; -1 is the last one.

    Raises:
        ValueError: a position outside the prompt, or a prompt of several rows.
    """
    return from_start(position, len(tokens_of(prompt)), "position")


def _stream_points(config: Llama4Config, names: str | Iterable[str] | None) -> list[str]:
    if names is None:
        names = ["embed", "layers.*.resid_mid", "layers.*.resid_post"]
    found = match(config, names)
    for name in found:
        if not re.fullmatch(r"embed|layers\.\d+\.resid_\w+", name):
            raise ValueError(
                f"{name!r} is no point of the residual stream: choose 'embed', or 'resid_pre', "
                "'resid_mid' or 'resid_post' of 'layers.0' and so on"
            )
    return found


def _targets(
    target: int | Sequence[int] | None, count: int, vocab_size: int
) -> Int[Tensor, " t"] | None:
    if target is None:
        return None
    refuse_words(target)
    given = getattr(target, "tolist", lambda: target)()  # of numpy and torch, too
    ids = [given] * count if isinstance(given, int) else list(given)
    if len(ids) != count:
        raise ValueError(
            f"{len(ids)} targets do not fit {count} positions: give one token id for all, or one "
            "for each"
        )
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"token id {token} is out of range: this vocabulary has ids 0 to {vocab_size - 1}"
            )
    return torch.tensor(ids)
