"""Decoding: one token after the other from a cache, sampled, streamed, interruptible."""

import warnings
from collections.abc import Collection, Iterator
from numbers import Real
from operator import index
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from llama4_lab.model import Llama4
from llama4_lab.model.static import StaticDecoder
from llama4_lab.trace import inputs_of


def generate(
    model: Llama4 | StaticDecoder,
    prompt: Any,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int | None = None,
    stop: Collection[int] | None = None,
    stream: bool = False,
    progress: bool = True,
) -> Any:
    """Continue a prompt and return the new text; a list of texts for a batch.

    `prompt` is what ``model.prompt`` returns, a text or chat messages for it, or token ids. With
    `stream`, return an iterator over pieces of text instead. Generation ends at a stop token (the
    config's, unless `stop` names others) or after `max_new_tokens`. Ctrl-C ends it early and keeps
    the text so far. A progress bar shows when it takes more than half a second.

    A `StaticDecoder` stands in for its model, one prompt at a time; where its `max_len` ends the
    text, a UserWarning says so.

    Args:
        temperature: 0 always takes the likeliest token.
        top_p: sample among the likeliest tokens that together hold this share of probability
            (Holtzman et al. 2020).
        seed: the same seed gives the same text.

    Raises:
        TypeError, ValueError: as `tokens`; ValueError for a model without tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer to write text with: load it from a folder that has one, "
            "or take ids from llama4_lab.generate.tokens"
        )
    prompt = inputs_of(model, prompt)
    rows = len(prompt["input_ids"])
    if stream and rows > 1:
        raise ValueError(
            f"stream=True takes one prompt, this is a batch of {rows}; call it for each"
        )
    steps = tokens(
        model, prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
    )
    stops = _stops(model, stop)
    if stream:
        ids = (int(step[0]) for step in steps)
        return model.tokenizer.stream(idx for idx in ids if idx not in stops)
    written: list[list[int]] = [[] for _ in range(rows)]
    ended = [False] * rows
    bar = tqdm(
        steps,
        total=max_new_tokens,
        desc="generate",
        unit="token",
        delay=0.5,
        disable=not progress,
    )
    try:
        for step in bar:
            for row, idx in enumerate(step.tolist()):
                ended[row] |= idx in stops
                if not ended[row]:
                    written[row].append(idx)
    except KeyboardInterrupt:
        bar.close()
    texts = [model.tokenizer.decode(ids) for ids in written]
    return texts if rows > 1 else texts[0]


def tokens(
    model: Llama4 | StaticDecoder,
    prompt: Any,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int | None = None,
    stop: Collection[int] | None = None,
) -> Iterator[Int[Tensor, " b"]]:
    """Yield the next token of every row until all rows have met a stop token.

    What a row yields after its stop token means nothing. The arguments are those of `generate`.

    Raises:
        ValueError: a temperature below zero, a top_p outside (0, 1], no tokens to make, or a seed
            of more than 64 bits.
        TypeError: a temperature or top_p that is no number; a number of tokens, a seed or stop
            tokens that are no whole numbers.
    """
    for name, given in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(given, Real):
            raise TypeError(f"{name}={given!r}: give a number")
    if not temperature >= 0:
        raise ValueError(
            f"temperature {temperature} is negative or no number: use 0 for the likeliest token, "
            "or more"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is outside (0, 1]: 1 keeps every token")
    if _whole("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} makes no token: ask for at least 1")
    stops = _stops(model, stop)
    if seed is not None and not -(2**63) <= (seed := _whole("seed", seed)) < 2**64:
        raise ValueError(f"seed {seed} is outside 64 bits: give -2**63 to 2**64 - 1")
    return _tokens(model, prompt, max_new_tokens, float(temperature), float(top_p), seed, stops)


def _stops(model: Llama4 | StaticDecoder, stop: Collection[int] | None) -> tuple[int, ...]:
    if stop is None:
        return tuple(model.config.stop_token_ids)
    if isinstance(stop, str) or not isinstance(stop, Collection):
        raise TypeError(f"stop={stop!r}: give the ids of the tokens that end a text, as (3, 4)")
    return tuple(_whole("stop", each) for each in stop)


def _whole(what: str, given: Any) -> int:
    try:
        return index(given)
    except TypeError:
        raise TypeError(f"{what}={given!r}: give whole numbers") from None


@torch.no_grad()
def _tokens(
    model: Llama4 | StaticDecoder, prompt, max_new_tokens, temperature, top_p, seed, stops
) -> Iterator[Tensor]:
    given = inputs_of(model, prompt)
    ends = torch.tensor(stops, dtype=torch.long, device=model.device)
    generator = torch.Generator(device=model.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    cache = model.new_cache(len(given["input_ids"]))
    logits = model(**given, cache=cache, keep_last=1)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=model.device)
    for count in range(1, max_new_tokens + 1):
        chosen = model.ranks.agreed(sample(logits[:, -1], temperature, top_p, generator))
        yield chosen
        ended |= torch.isin(chosen, ends)
        if ended.all() or count == max_new_tokens:
            return
        if cache.slots == getattr(model, "max_len", None):  # of a StaticDecoder
            warnings.warn(
                f"the text ends after {count} tokens, for max_len {cache.slots} of the decoder is "
                "reached: make it with a larger one",
                stacklevel=2,
            )
            return
        logits = model(chosen[:, None], cache=cache, keep_last=1)


def sample(
    logits: Float[Tensor, "b v"],
    temperature: float,
    top_p: float,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " b"]:
    """Draw one token from each row's nucleus.

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0, top_p=1).tolist()
    [1]
    """
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # no division overflows upwards
    probability, token = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if top_p < 1:  # rounded sums reach 1 too early
        before = probability.cumsum(dim=-1) - probability
        probability = probability.masked_fill((before >= top_p) & (before > 0), 0.0)
    place = torch.multinomial(probability, 1, generator=generator)
    return token.gather(-1, place)[:, 0]
