"""What a model needs on a machine, and the fastest that the machine allows: pure arithmetic.

Sizes are bytes, rates per second. A roofline is the larger of two times: to read what has to be
read once, and to do the products (Williams et al. 2009); nothing else is counted. A decode step is
taken at the end of a chunk, where RoPE layers read the most: no program is faster there, and
elsewhere a step reads up to a whole chunk of their cache less. Routing is taken as uniform. GPUs
are in `llama4_lab.hardware`, the report of ``llama4-lab plan`` in `llama4_lab.plan_page`.
"""

import math
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from llama4_lab.config import Llama4Config
from llama4_lab.hardware import GPU
from llama4_lab.packed import GROUP, KINDS

PRECISIONS = ("bf16", *KINDS)
CACHE_BYTES = {"bf16": 2, "fp8": 1}
PIECE = 8192  # tokens of a prompt that go through the layers together
USABLE = 0.96  # share of a GPU's memory, the rest is fragments and the driver's
RUNTIME = 1.7e9  # bytes: an allowance for CUDA's context, libraries and graphs; not measured
ALL_REDUCE = 8e-6  # seconds of a small all-reduce among GPUs of one machine; an estimate
# Whole on every GPU of a plan, as in `llama4_lab.parallel`; and so is the table of embeddings.
REPLICATED = ("norms", "routers", "vision encoder", "projector")


# ---- sizes


def bytes_per_weight(precision: str, k: int) -> float:
    """Return the bytes of one weight in a row of k, with its share of the row's scales.

    >>> [bytes_per_weight(precision, 5120) for precision in ("bf16", "int8", "int4")]
    [2.0, 1.015625, 0.515625]

    Raises:
        ValueError: an unknown precision.
    """
    _require_known("precision", precision, PRECISIONS)
    if precision == "bf16":
        return 2.0
    if precision == "fp8":
        return 1.0 + 4.0 / k  # one float32 scale a row
    group = min(GROUP, k & -k)  # as `pack` chooses it
    return (1.0 if precision == "int8" else 0.5) + 2.0 / group


def weight_bytes(
    config: Llama4Config, precision: str = "bf16", head: str | None = None
) -> dict[str, float]:
    """Return the bytes of each part of `Llama4Config.parameter_counts`, with total and active.

    The text decoder's linears are in `precision`, the read-out in `head` if that is given; routers,
    norms, biases, embeddings and vision stay in bfloat16.
    """
    counts = config.parameter_counts()
    d, q = config.hidden_size, config.num_attention_heads * config.head_dim
    f, dense = config.intermediate_size, config.intermediate_size_mlp
    by_d, by_q = bytes_per_weight(precision, d), bytes_per_weight(precision, q)
    mlp = {width: (2 * by_d + bytes_per_weight(precision, width)) / 3 for width in (f, dense)}
    sizes = {part: 2.0 * count for part, count in counts.items()}
    o_proj = config.num_hidden_layers * q * d
    biases = config.num_hidden_layers * config.attention_bias * (q + 2 * _kv_width(config) + d)
    sizes["attention"] = (
        (counts["attention"] - o_proj - biases) * by_d + o_proj * by_q + biases * 2.0
    )
    sizes["routed experts"] = counts["routed experts"] * mlp[f]
    sizes["shared experts"] = counts["shared experts"] * mlp[f]
    sizes["dense MLPs"] = counts["dense MLPs"] * mlp[dense]
    if not config.tie_word_embeddings:
        sizes["embeddings"] = config.vocab_size * d * (2.0 + bytes_per_weight(head or precision, d))
    del sizes["total"], sizes["active"]
    idle = sizes["routed experts"] * (1 - config.num_experts_per_tok / config.num_local_experts)
    total = sum(sizes.values())
    vision = sizes.get("vision encoder", 0.0) + sizes.get("projector", 0.0)
    return sizes | {"total": total, "active": total - vision - idle}


def cache_bytes(config: Llama4Config, context: int, batch: int = 1, dtype: str = "bf16") -> float:
    """Return the bytes of keys and values: NoPE layers keep all, RoPE layers at most one chunk."""
    _require_known("cache dtype", dtype, CACHE_BYTES)
    kept = sum(min(context, chunk or context) for chunk in _chunks(config))
    return float(batch * kept * 2 * _kv_width(config) * CACHE_BYTES[dtype])


def activation_bytes(config: Llama4Config, tokens: int, batch: int = 1, num_gpus: int = 1) -> float:
    """Return what a forward pass over so many tokens holds at once on a GPU, at the least.

    That is inside a MoE layer: residual stream, norm and sum, and for each choice the gathered row,
    gate, up, hidden and output, in bfloat16; and the logits of one token of each row.
    """
    d, k = config.hidden_size, config.num_experts_per_tok
    wide = k * config.intermediate_size
    if not _is_all_moe(config):
        wide = max(wide, config.intermediate_size_mlp)
    per_token = (3 + 2 * k) * d + 3 * wide / num_gpus
    return 2.0 * tokens * per_token + batch * config.vocab_size * 6.0  # bfloat16 and float32


# ---- work


def distinct_experts(num_experts: int, tokens: int, topk: int = 1) -> float:
    """Return how many experts tokens are expected to choose between them, by uniform routing.

    >>> round(distinct_experts(16, 8), 2)
    6.45
    """
    return num_experts * (1 - (1 - topk / num_experts) ** tokens)


def step_bytes(
    config: Llama4Config,
    batch: int = 1,
    context: int = 4096,
    weights: str = "bf16",
    cache: str = "bf16",
    head: str | None = None,
    distinct: float | None = None,
) -> dict[str, float]:
    """Return what one decode step reads, by part; the cache with full chunks, the most there is.

    Right behind a chunk's border, RoPE layers keep ``context % chunk`` keys and read only these.
    `distinct` experts are read in each layer: by default as many as are expected.
    """
    sizes = weight_bytes(config, weights, head)
    d, e = config.hidden_size, config.num_local_experts
    if distinct is None:
        distinct = distinct_experts(e, batch, config.num_experts_per_tok)
    read = {
        part: sizes[part]
        for part in ("attention", "norms", "routers", "shared experts", "dense MLPs")
    }
    read["routed experts"] = sizes["routed experts"] * distinct / e
    read_out = "bf16" if config.tie_word_embeddings else head or weights
    read["head"] = config.vocab_size * d * bytes_per_weight(read_out, d)
    read["cache"] = cache_bytes(config, context, batch, cache)
    return read


def token_flops(config: Llama4Config) -> float:
    """Return the FLOPs of one token's products, without attention over keys and the read-out."""
    counts = config.parameter_counts()
    parts = ("attention", "routers", "shared experts", "dense MLPs")
    routed = counts["routed experts"] * config.num_experts_per_tok / config.num_local_experts
    return 2.0 * (sum(counts[part] for part in parts) + routed)


def attention_flops(config: Llama4Config, tokens: int) -> float:
    """Return the FLOPs of attention over keys in a prompt: 4·h·dh for each pair that is seen."""
    pairs = 0
    for chunk in _chunks(config):
        size = chunk or max(tokens, 1)
        whole, tail = divmod(tokens, size)
        pairs += whole * size * (size + 1) // 2 + tail * (tail + 1) // 2
    return 4.0 * config.num_attention_heads * config.head_dim * pairs


def head_flops(config: Llama4Config) -> float:
    return 2.0 * config.vocab_size * config.hidden_size


def moe_layer_bytes(config: Llama4Config, tokens: int, weights: str = "bf16") -> float:
    """Return what one MoE layer reads: the experts that are hit, and the shared one."""
    d, f, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    expert = d * f * (2 * bytes_per_weight(weights, d) + bytes_per_weight(weights, f))
    return expert * (1 + distinct_experts(e, tokens, config.num_experts_per_tok))


def moe_layer_flops(config: Llama4Config, tokens: int) -> float:
    """Return the FLOPs of one MoE layer's routed and shared experts."""
    expert = 3 * config.hidden_size * config.intermediate_size
    return 2.0 * tokens * expert * (config.num_experts_per_tok + 1)


# ---- plans


@dataclass(frozen=True)
class Roofline:
    """The least time for some tokens, and where it goes."""

    tokens: int
    bytes: dict[str, float]  # read by all GPUs together, by part
    flops: float
    read_seconds: float
    math_seconds: float
    exchange_seconds: float  # all-reduces among several GPUs; an estimate

    @property
    def seconds(self) -> float:
        return max(self.read_seconds, self.math_seconds) + self.exchange_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def is_read_bound(self) -> bool:
        return self.read_seconds >= self.math_seconds


def _require_some(*counts: int) -> None:
    if min(counts) < 1:
        raise ValueError(f"a plan is for rows and tokens, at least one of each, not {min(counts)}")


@dataclass(frozen=True)
class Plan:
    """A model on one or several equal GPUs, with tensor parallel layers on several.

    Raises:
        ValueError: an unknown precision, or GPUs that cannot share the model evenly.
    """

    config: Llama4Config
    gpu: GPU
    num_gpus: int = 1
    weights: str = "bf16"
    cache: str = "bf16"
    head: str | None = None  # the weights' precision

    def __post_init__(self) -> None:
        _require_known("precision", self.weights, PRECISIONS)
        _require_known("precision", self.head or self.weights, PRECISIONS)
        _require_known("cache dtype", self.cache, CACHE_BYTES)
        if self.num_gpus not in (possible := possible_num_gpus(self.config)):
            counts = divided(self.config)
            what = next(x for x, n in counts.items() if self.num_gpus < 1 or n % self.num_gpus)
            raise ValueError(
                f"{self.num_gpus} GPUs cannot share {counts[what]} {what} evenly; "
                f"choose {', '.join(map(str, possible))}"
            )

    # ---- memory of each GPU

    @property
    def usable(self) -> float:
        """Bytes of one GPU that the plan may fill."""
        return USABLE * self.gpu.memory

    def needed(self, batch: int = 1, context: int = 8192) -> dict[str, float]:
        """Return the bytes that each GPU needs, by purpose.

        Raises:
            ValueError: less than one row or token.
        """
        _require_some(batch, context)
        piece = min(PIECE, batch * context)
        return {
            "weights": self._weights(),
            "cache": cache_bytes(self.config, context, batch, self.cache) / self.num_gpus,
            "activations": activation_bytes(self.config, piece, batch, self.num_gpus),
            "runtime": RUNTIME,
        }

    def _weights(self) -> float:
        """Return the bytes of weights on each GPU.

        Left out are some thousandths: biases and fp8's scales of rows that are divided, which are
        whole on every GPU.
        """
        sizes = weight_bytes(self.config, self.weights, self.head)
        if self.num_gpus == 1:
            return sizes["total"]
        table = 2.0 * self.config.vocab_size * self.config.hidden_size
        whole = table + sum(sizes.get(part, 0.0) for part in REPLICATED)
        divided = sizes["total"] - whole
        if self.config.tie_word_embeddings:
            divided += table  # each GPU holds its part of the read-out beside the table
        return whole + divided / self.num_gpus

    def fits(self, batch: int = 1, context: int = 8192) -> bool:
        return sum(self.needed(batch, context).values()) <= self.usable

    def longest_context(self, batch: int = 1) -> int:
        """Return the most tokens of each row that memory holds; 0 if the weights do not fit.

        The model may be made for fewer (`max_position_embeddings`). It is at most 2³² - 1.
        """

        def is_too_long(context: int) -> bool:
            return not self.fits(batch, context)

        return bisect_left(range(1, 2**32), True, key=is_too_long)

    # ---- time

    def decode(
        self, batch: int = 1, context: int = 4096, distinct: float | None = None
    ) -> Roofline:
        """Return the roofline of one step: a token for each row, after `context` tokens.

        It is that of the end of a chunk, where RoPE layers read the most (`step_bytes`). Elsewhere
        a step can be faster: Scout in int4 up to 14% for one row of 8192 tokens, 34% for 8.
        `distinct` experts are read in each layer: by default as many as are expected.

        Raises:
            ValueError: less than one row, or no number of tokens.
        """
        _require_some(batch, context + 1)
        read = step_bytes(
            self.config, batch, context, self.weights, self.cache, self.head, distinct
        )
        seen = sum(min(context, chunk or context) for chunk in _chunks(self.config))
        attention = 4.0 * self.config.num_attention_heads * self.config.head_dim * seen
        products = token_flops(self.config) + head_flops(self.config)
        return self._roofline(batch, batch, read, batch * products, batch * attention)

    def prefill(self, tokens: int = 8192) -> Roofline:
        """Return the roofline of one prompt up to its first new token; weights are read once.

        Raises:
            ValueError: less than one token.
        """
        _require_some(tokens)
        read = step_bytes(self.config, tokens, 0, self.weights, self.cache, self.head)
        products = tokens * token_flops(self.config) + head_flops(self.config)
        return self._roofline(tokens, tokens, read, products, attention_flops(self.config, tokens))

    def _roofline(
        self, tokens: int, rows: int, read: dict[str, float], products: float, attention: float
    ) -> Roofline:
        """Products run at the weights' rate (int8 and int4 are unpacked), attention in bfloat16."""
        gpu, n = self.gpu, self.num_gpus
        rate = gpu.fp8 if self.weights == "fp8" else gpu.bf16
        message = 2.0 * rows * self.config.hidden_size
        reduce = ALL_REDUCE + 2 * (n - 1) / n * message / gpu.link if n > 1 else 0.0
        return Roofline(
            tokens=tokens,
            bytes=read,
            flops=products + attention,
            read_seconds=sum(read.values()) / n / gpu.bandwidth,
            math_seconds=(products / rate + attention / gpu.bf16) / n,
            exchange_seconds=2 * self.config.num_hidden_layers * reduce,
        )


def divided(config: Llama4Config) -> dict[str, int]:
    """Return what tensor parallel GPUs divide evenly among them, with its number."""
    counts = {"key/value heads": config.num_key_value_heads, "tokens": config.vocab_size}
    if config.routed_layers:
        counts["neurons of an expert"] = config.intermediate_size
    if not _is_all_moe(config):
        counts["neurons of an MLP"] = config.intermediate_size_mlp
    return counts


def possible_num_gpus(config: Llama4Config) -> list[int]:
    """Return by how many GPUs the model can be shared evenly."""
    common = math.gcd(*divided(config).values())
    return [n for n in range(1, common + 1) if common % n == 0]


@cache
def _chunks(config: Llama4Config) -> tuple[int | None, ...]:
    return tuple(config.attention_chunk(layer) for layer in range(config.num_hidden_layers))


@cache
def _is_all_moe(config: Llama4Config) -> bool:
    return all(config.is_moe(layer) for layer in range(config.num_hidden_layers))


def _kv_width(config: Llama4Config) -> int:
    return config.num_key_value_heads * config.head_dim


def _require_known(what: str, given: str, known: Collection[str]) -> None:
    if given not in known:
        raise ValueError(f"unknown {what} {given!r}; choose {', '.join(known)}")
