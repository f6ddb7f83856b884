"""Compile prefill and decoding with ``fullgraph=True``, which refuses graph breaks.

A program of its own, because the checks that the test run puts on annotations cannot be traced.
The backend ``eager`` runs what was traced as it is: graph breaks are found without a C++ compiler.
"""

import torch
from tiny import tiny

from llama4_lab import packed
from llama4_lab.checkpoint.quantised import packable
from llama4_lab.model.static import StaticDecoder
from llama4_lab.packed import linear, pack

torch.set_grad_enabled(False)
torch.manual_seed(0)
packed._LEAST = 1  # or no product here were ours
counters = torch._dynamo.utils.counters["stats"]


def compiled(function, **options):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, fullgraph=True, backend="eager", **options)


def small(backend, kind=None):
    """A model in bfloat16, the only dtype that torch traces grouped_mm in."""
    shape = {"num_hidden_layers": 3, "no_rope_layer_interval": 3, "vision_config": None}
    model = tiny(hidden_size=64, intermediate_size=32, **shape).bfloat16()
    model.backend = backend
    for held, name in packable(model).values() if kind else ():
        held.put(name, pack(getattr(held, name), kind))
    return model


def check_close(found, expected):
    """In bfloat16, traced products and ours round otherwise: some 2**-9 of the largest number."""
    is_half = expected.dtype == torch.bfloat16
    rounding = {"atol": 2**-6 * expected.abs().max().item(), "rtol": 0.016} if is_half else {}
    torch.testing.assert_close(found, expected, **rounding)


def check_decoding(model, b):
    ids = torch.randint(90, (b, 20))
    plain, decoder = (StaticDecoder(model, b, max_len=20) for _ in range(2))
    decoder.run = compiled(decoder._plain)
    for each in plain, decoder:
        each.prefill(ids[:, :5])
    for t in range(5, 20):  # over two borders of chunks
        check_close(decoder.step(ids[:, t]), plain.step(ids[:, t]))
        torch.testing.assert_close(decoder.routed, plain.routed)
    assert counters["unique_graphs"] == 1, counters


def check_prefill(model):
    run = compiled(model, dynamic=True)
    for t in (5, 7, 19):  # inside a chunk of 8; two chunks and a tail
        ids = torch.randint(90, (2, t))
        check_close(run(ids), model(ids))
    assert counters["unique_graphs"] <= 2, counters  # one for each kind of length


def check_product():
    weight, x = pack(torch.randn(7, 128), "int4"), torch.randn(3, 128).bfloat16()
    found = compiled(lambda x: linear(x, weight))(x)
    # Traced, weights and sums are rounded to bfloat16: 2**-9 of each of 128, and of the outcome.
    torch.testing.assert_close(found, linear(x, weight), atol=0.1, rtol=0.02)


check_product()
check_decoding(small("grouped"), 2)
check_decoding(small("gather", "int4").float(), 1)
check_decoding(small("auto").float(), 2)
check_decoding(small("numba").float(), 2)
check_decoding(small("auto", "int8").float(), 2)
check_prefill(small("grouped"))
