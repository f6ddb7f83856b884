"""The report and the tables of ``llama4-lab plan``."""

from collections.abc import Iterable

from llama4_lab.config import BEHEMOTH_ESTIMATE, MAVERICK, SCOUT, Llama4Config
from llama4_lab.hardware import GPUS, MATRIX_SHARE, READ_SHARE
from llama4_lab.plan import (
    ALL_REDUCE,
    PIECE,
    RUNTIME,
    USABLE,
    Plan,
    Roofline,
    cache_bytes,
    possible_num_gpus,
    weight_bytes,
)

ESTIMATE = "AN ESTIMATE: this model was never released, its sizes are invented"
CONTEXT = 8192  # tokens, of the table
_PAGE = """\
# Plans

What Llama 4 needs on common GPUs, and the fastest that they allow. This page is written by
`llama4-lab plan --table`. About one case, `llama4-lab plan scout --gpu h100 --quantize int4
--context 1000000` tells more, with reasons; `llama4_lab.plan` has the same arithmetic as functions.

Each line takes the fewest equal GPUs of one machine, {most} at most, that hold the model and one
row of {context:,} tokens, with a bfloat16 cache; GPUs that cannot are left out. Memory counts
{usable:.0%} of what the driver reports, less the activations of {piece:,} tokens at a time and
{runtime:.1f} GB for CUDA and its libraries. Attention, experts, dense layers and the read-out are
in the precision of the heading; embeddings, routers, norms and the vision encoder stay in bfloat16.
int4 counts 4 bits, and a bfloat16 scale for 128 weights. The longest context is what memory holds,
and no more than the model is made for.

Speeds are rooflines for text at {context:,} tokens: the larger of reading everything once and of
doing the products, with {read:.0%} of the data sheet's bandwidth and {matrix:.0%} of its matrix
rate. These shares were measured on an H200 (4.3 TB/s, 788 TFLOP/s) and are assumed for the others.
A step of decoding is taken at the end of a chunk, where RoPE layers read the most, and no program
is faster there. Right behind a chunk's border they have next to nothing to read, of Scout's cache
{chunk:.1f} GB a row less. Rows are taken to choose experts evenly, each by itself, so that some
read the same ones. Published programs reach 25 to 70% when they decode one row. Several GPUs spend
time on all-reduces, two a layer: counted are {latency:.0f} µs each and the time on the link, which
is an estimate, and too little for GPUs that are joined by PCIe only.

{tables}"""


def table_page() -> str:
    """Return the page of the documentation: every model on every GPU, in three precisions."""
    return _PAGE.format(
        most=max(possible_num_gpus(SCOUT)),
        context=CONTEXT,
        usable=USABLE,
        piece=PIECE,
        runtime=RUNTIME / 1e9,
        read=READ_SHARE,
        matrix=MATRIX_SHARE,
        chunk=_cache(SCOUT, 1, CONTEXT, "bf16")[1] / 1e9,
        latency=ALL_REDUCE * 1e6,
        tables="\n".join(f"## {kind}\n\n{table(kind)}" for kind in ("int4", "fp8", "bf16")),
    )


def table(weights: str) -> str:
    """Return one line for each model and each GPU that can hold it, in Markdown."""
    models = {"Scout": SCOUT, "Maverick": MAVERICK, "Behemoth (an estimate)": BEHEMOTH_ESTIMATE}
    head = (
        "model, GB of weights",
        "GPU",
        "GPUs",
        "longest context",
        "decode, tokens/s",
        "of 8 rows together",
        "prefill, tokens/s",
        "first token after",
    )
    lines = [head, ("---",) * 2 + ("--:",) * (len(head) - 2)]
    for name, config in models.items():
        total = weight_bytes(config, weights)["total"] / 1e9
        found = list(_lines(config, weights)) or [("none of these", *("–",) * 6)]
        lines += [(f"{name}, {total:,.0f}", *cells) for cells in found]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _lines(config: Llama4Config, weights: str) -> Iterable[tuple[str, ...]]:
    for gpu in GPUS.values():
        plans = [Plan(config, gpu, n, weights=weights) for n in possible_num_gpus(config)]
        plan = next((plan for plan in plans if plan.fits(context=CONTEXT)), None)
        if plan is None:
            continue
        prefill = plan.prefill(CONTEXT)
        yield (
            gpu.name,
            str(plan.num_gpus),
            f"{_most_tokens(plan):,}",
            f"{plan.decode(1, CONTEXT).tokens_per_second:,.0f}",
            f"{plan.decode(8, CONTEXT).tokens_per_second:,.0f}",
            f"{prefill.tokens_per_second:,.0f}",
            _seconds(prefill.seconds),
        )


def counts(config: Llama4Config, weights: str = "bf16", head: str | None = None) -> str:
    """Return parameters and bytes by part."""
    lines = [ESTIMATE] if config.is_estimate else []
    sizes = weight_bytes(config, weights, head)
    for part, count in config.parameter_counts().items():
        note = "" if sizes[part] == 2 * count else " packed"
        if part == "total":
            note = f"{note} in {'bfloat16' if weights == 'bf16' else weights}"
        lines.append(f"{part:16} {count:>22,} {_gigabytes(sizes[part]):>13}{note}")
    return "\n".join(lines)


def report(plan: Plan, batch: int = 1, context: int | None = None) -> str:
    """Return what the model needs on these GPUs, whether it fits, and rooflines with reasons.

    Args:
        context: tokens of each row; None stands for 8192, or fewer if the model is made for fewer.

    Raises:
        ValueError: the context is longer than the model is made for.
    """
    config, gpu = plan.config, plan.gpu
    most = config.max_position_embeddings
    if context is None:
        context = min(CONTEXT, most)
    if context > most:
        raise ValueError(
            f"the context of {context:,} tokens is too long: the model is made for {most:,} tokens "
            "only, give at most as many"
        )
    needed = plan.needed(batch, context)
    nope = sum(config.attention_chunk(i) is None for i in range(config.num_hidden_layers))
    chunked = config.num_hidden_layers - nope
    per_token, chunks = (
        size / plan.num_gpus for size in _cache(config, batch, context, plan.cache)
    )
    notes = {
        "weights": "as above" if plan.num_gpus == 1 else f"on each of {plan.num_gpus} GPUs",
        "cache": f"{per_token:,.0f} bytes a token in {_that_see(nope, 'all')}, "
        f"{_gigabytes(chunks)} in {_that_see(chunked, 'a chunk')}",
        "activations": f"of {min(PIECE, batch * context):,} tokens at a time",
        "runtime": "an allowance for CUDA, its libraries and graphs",
    }
    lines = [
        counts(config, plan.weights, plan.head),
        "",
        f"{plan.num_gpus} x {gpu.name}: {plan.usable / 1e9:.2f} GB usable, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s, {gpu.bf16 / 1e12:.0f} TFLOP/s in bfloat16; "
        f"{_rows(batch)} of {context:,} tokens",
        *(f"{what:12} {_gigabytes(needed[what]):>10}  {note}" for what, note in notes.items()),
        _fit(plan, batch, context),
    ]
    return "\n".join([*lines, *_speeds(plan, batch, context)])


def _fit(plan: Plan, batch: int, context: int) -> str:
    needed = sum(plan.needed(batch, context).values())
    verdict = "fits" if needed <= plan.usable else "DOES NOT FIT"
    each = "" if plan.num_gpus == 1 else " a GPU"
    return f"{'needed':12} {_gigabytes(needed):>10}{each}: {verdict}; {longest(plan, batch)}"


def longest(plan: Plan, batch: int = 1) -> str:
    """Say how many tokens of each row memory holds, of those that the model is made for."""
    if not (most := _most_tokens(plan, batch)):
        return "the weights leave no room for a context: take fewer bits or more GPUs"
    said = f"the longest context is {most:,} token" + "s" * (most > 1)
    if most == plan.config.max_position_embeddings:
        said += ", what the model is made for"
    return said


def _most_tokens(plan: Plan, batch: int = 1) -> int:
    return min(plan.longest_context(batch), plan.config.max_position_embeddings)


def _cache(config: Llama4Config, batch: int, context: int, dtype: str) -> tuple[float, float]:
    """Return the cache's bytes of a token in layers that see all, and all those of the others."""
    layers = range(config.num_hidden_layers)
    full = sum(config.attention_chunk(layer) is None for layer in layers)
    per_token = full * cache_bytes(config, 1, dtype=dtype) / max(1, len(layers))
    return per_token, cache_bytes(config, context, batch, dtype) - per_token * context * batch


def _speeds(plan: Plan, batch: int, context: int) -> Iterable[str]:
    decode, prefill = plan.decode(batch, context), plan.prefill(context)
    yield (
        f"decode       {decode.tokens_per_second:>10,.0f} tokens/s at most, "
        f"{_seconds(decode.seconds)} a step"
    )
    yield f"             {reason(decode, plan)}"
    chunks = _cache(plan.config, batch, context, plan.cache)[1]
    if chunks and context >= (plan.config.attention_chunk_size or 0):
        yield (
            "             at the end of a chunk, where it reads the most; right behind one, "
            f"{_gigabytes(chunks)} less"
        )
    yield (
        f"prefill      {prefill.tokens_per_second:>10,.0f} tokens/s at most, "
        f"the first token after {_seconds(prefill.seconds)}"
    )
    yield f"             {reason(prefill, plan)}"
    yield (
        f"rates are {READ_SHARE:.0%} of the data sheet's bandwidth and {MATRIX_SHARE:.0%} of its "
        "matrix rate, as measured on an H200"
    )


def reason(roofline: Roofline, plan: Plan) -> str:
    """Say what bounds a roofline, with its times."""
    cache = roofline.bytes["cache"]
    weights = sum(roofline.bytes.values()) - cache
    read = f"reading {_gigabytes(weights)} of weights"
    if cache:
        read += f" and {_gigabytes(cache)} of cache"
    read += f" takes {_seconds(roofline.read_seconds)}"
    math = (
        f"{roofline.flops / roofline.tokens / 1e9:.4g} GFLOP a token "
        f"take {_seconds(roofline.math_seconds)}"
    )
    if roofline.is_read_bound:
        text = f"bound by memory: {read}; {math}"
    else:
        text = f"bound by arithmetic: {math}; {read}"
    if plan.num_gpus > 1:
        text += f"; all-reduces an estimated {_seconds(roofline.exchange_seconds)} more"
    return text


def _rows(batch: int) -> str:
    return "one row" if batch == 1 else f"{batch:,} rows"


def _that_see(layers: int, what: str) -> str:
    return f"1 layer that sees {what}" if layers == 1 else f"{layers} layers that see {what}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
