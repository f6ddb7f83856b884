"""The plan's arithmetic: against hand calculations, against real tensors, and as it is printed."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from tiny import CONFIG, tiny
from torch.distributed.device_mesh import DeviceMesh

import llama4_lab as l4
from llama4_lab import cli, parallel, plan_page
from llama4_lab.hardware import GPUS, find_gpu
from llama4_lab.model.attention import visible
from llama4_lab.packed import KINDS, pack
from llama4_lab.parallel.ranks import check
from llama4_lab.plan import (
    CACHE_BYTES,
    Plan,
    activation_bytes,
    attention_flops,
    bytes_per_weight,
    cache_bytes,
    distinct_experts,
    moe_layer_bytes,
    moe_layer_flops,
    possible_num_gpus,
    step_bytes,
    token_flops,
    weight_bytes,
)

H100, H200 = GPUS["h100"], GPUS["h200"]
H100_SHEET = dataclasses.replace(H100, bandwidth=3.35e12)  # what an ideal copy would reach
SCOUT_INT4 = Plan(l4.SCOUT, H200, weights="int4", head="bf16")
PAGE = Path(__file__).parents[1] / "docs" / "plan.md"


def percent(share: float) -> float:
    return share / 100


# ---- hand calculations. Scout: d = h·dh = 5120, kv = 1024, f = 8192, 48 layers, 16 experts, v =
# 202048: attention 48·(2·5120·5120 + 2·5120·1024) = 3.0199e9, one expert 3·5120·8192 = 125.83e6,
# 48 of them 6.0398e9, read-out 1.0345e9. int4: 0.5 + 2/128 = 0.515625 bytes.


@pytest.mark.parametrize(
    ("weights", "head", "batch", "gigabytes"),
    [
        ("bf16", "bf16", 1, 32.3),  # 2 · (3.02 + 6.04 + 6.04 + 1.03)
        ("bf16", "bf16", 8, 98.2),  # 6.45 experts of 16
        ("bf16", "bf16", 64, 210.4),
        ("fp8", "bf16", 1, 17.2),
        ("fp8", "bf16", 8, 50.1),
        ("fp8", "bf16", 64, 106.2),
        ("int4", "bf16", 1, 9.87),  # 0.515625 · 15.1 + 2 · 1.03
        ("int4", "bf16", 8, 26.9),
        ("int4", "bf16", 64, 55.8),
        ("int4", "int8", 1, 8.84),
        ("int4", None, 1, 8.33),  # 0.515625 · 16.13
    ],
)
def test_a_decode_step_of_scout_reads_what_was_reckoned(weights, head, batch, gigabytes):
    read = sum(step_bytes(l4.SCOUT, batch, 0, weights, head=head).values())
    assert read / 1e9 == pytest.approx(gigabytes, rel=percent(0.3))


@pytest.mark.parametrize(
    ("context", "tokens_per_second"),
    # 4.3e12 / (9.86e9 + 49152 · context + 147456 · min(context, 8192))
    [(4096, 403), (8192, 375), (32768, 339), (131072, 245), (524288, 117), (2**20, 69)],
)
def test_the_decode_roofline_falls_with_context_as_reckoned(context, tokens_per_second):
    found = SCOUT_INT4.decode(context=context)
    assert found.tokens_per_second == pytest.approx(tokens_per_second, rel=percent(0.5))
    assert found.is_read_bound


@pytest.mark.parametrize(
    ("gpu", "weights", "expected"),
    [
        (H200, "int4", (403, 1033, 2564)),
        (H200, "fp8", (239, 608, 1744)),
        (H100_SHEET, "int4", (314, 805, 1998)),
    ],
)
def test_the_decode_roofline_grows_with_the_batch_as_reckoned(gpu, weights, expected):
    plan = Plan(l4.SCOUT, gpu, weights=weights, head="bf16")
    found = [plan.decode(batch).tokens_per_second for batch in (1, 8, 64)]
    assert found == pytest.approx(expected, rel=percent(0.3))


@pytest.mark.parametrize(
    ("tokens", "gflop", "tokens_per_second"),
    # 2 · 15.1e9, and of attention 4 · 5120 · (36 · min(t, 8192) / 2 + 12 · t / 2); at 788 TFLOP/s
    [
        (512, 30.5, 25.9e3),
        (2048, 31.2, 25.2e3),
        (8192, 34.2, 23.0e3),
        (32768, 37.3, 21.2e3),
        (131072, 49.3, 16.0e3),
        (2**20, 162, 4.9e3),
    ],
)
def test_the_prefill_roofline_is_as_reckoned(tokens, gflop, tokens_per_second):
    found = SCOUT_INT4.prefill(tokens)
    assert found.flops / tokens / 1e9 == pytest.approx(gflop, rel=percent(0.5))
    assert found.tokens_per_second == pytest.approx(tokens_per_second, rel=percent(1))
    assert not found.is_read_bound


def test_a_short_prompt_waits_for_the_weights():
    found = SCOUT_INT4.prefill(64)  # all 16 experts, 56 GB, for 2 TFLOP
    assert found.is_read_bound
    assert found.seconds == pytest.approx(13e-3, rel=percent(2))


@pytest.mark.parametrize(
    ("gpu", "weights", "cache", "context"),
    # (0.96 · memory - weights - 2.5 GB - one chunk of 36 layers) / 49152 bytes a token, half of it
    # with an fp8 cache; 2.5 GB are activations and the allowance.
    [
        (H100, "int4", "bf16", 366e3),
        (H100, "int4", "fp8", 757e3),
        (H200, "int4", "bf16", 1.64e6),
        (H200, "fp8", "bf16", 599e3),
        (H200, "fp8", "fp8", 1.22e6),
    ],
)
def test_the_longest_context_is_as_reckoned(gpu, weights, cache, context):
    plan = Plan(l4.SCOUT, gpu, weights=weights, cache=cache, head="bf16")
    assert plan.longest_context() == pytest.approx(context, rel=percent(0.5))


def test_the_cache_of_scout_grows_by_49152_bytes_a_token_beyond_a_chunk():
    assert cache_bytes(l4.SCOUT, 20001) - cache_bytes(l4.SCOUT, 20000) == 49152
    assert cache_bytes(l4.SCOUT, 101) - cache_bytes(l4.SCOUT, 100) == 196608
    assert cache_bytes(l4.SCOUT, 20000) - 20000 * 49152 == 8192 * 147456  # 1.208 GB
    assert cache_bytes(l4.SCOUT, 10**7) == pytest.approx(491e9 + 1.2e9, rel=percent(0.2))


def test_one_moe_layer_is_as_reckoned():
    megabytes = [
        moe_layer_bytes(l4.SCOUT, batch, kind) / 1e6
        for batch in (1, 8, 64)
        for kind in ("bf16", "fp8", "int4")
    ]
    expected = [503, 252, 130, 1875, 938, 484, 4213, 2107, 1086]
    assert megabytes == pytest.approx(expected, rel=percent(0.3))
    assert moe_layer_flops(l4.SCOUT, 8192) == pytest.approx(4.12e12, rel=percent(0.3))
    assert moe_layer_bytes(l4.MAVERICK, 8) == pytest.approx(2211e6, rel=percent(0.3))


def test_maverick_on_eight_gpus_is_as_reckoned():
    plan = Plan(l4.MAVERICK, H100_SHEET, 8, weights="fp8", head="bf16")
    steps = [plan.decode(batch) for batch in (1, 8, 64)]
    found = [step.tokens / max(step.read_seconds, step.math_seconds) for step in steps]
    assert found == pytest.approx((1486, 4855, 7857), rel=percent(0.3))
    # 96 all-reduces of 8 µs, and 82 kB a row at most on the links
    assert steps[0].exchange_seconds == pytest.approx(0.77e-3, rel=percent(0.5))
    # 96 all-reduces of 84 MB at 450 GB/s: 2 · 7/8 · 84e6 / 450e9 = 0.33 ms each
    assert plan.prefill(8192).exchange_seconds == pytest.approx(31e-3, rel=percent(5))


def test_the_activations_of_a_piece_stay_below_a_gigabyte():
    # 8192 tokens · (5 · 5120 + 3 · 8192) · 2 bytes
    assert activation_bytes(l4.SCOUT, 8192) == pytest.approx(0.822e9, rel=percent(0.3))
    # its dense layers are 16384 wide
    assert activation_bytes(l4.MAVERICK, 8192) == pytest.approx(1.226e9, rel=percent(0.3))


# ---- against real tensors


@pytest.mark.parametrize("kind", KINDS)
def test_weight_bytes_are_those_of_packed_tensors(kind):
    sizes = weight_bytes(CONFIG, kind)
    parts = dict.fromkeys(CONFIG.parameter_counts(), 0.0)
    for name, weight in tiny().named_parameters():
        part, is_packed = part_of(name)
        parts[part] += pack(weight, kind).nbytes if is_packed else 2 * weight.numel()
    del parts["total"], parts["active"]
    assert sizes["total"] == pytest.approx(sum(parts.values()))
    assert {part: sizes[part] for part in parts} == pytest.approx(parts)


def part_of(name: str) -> tuple[str, bool]:
    """A parameter's part in the counts, and whether it is packed."""
    if name.startswith("vision_model"):
        return "vision encoder", False
    for piece, part, is_packed in [
        ("multi_modal_projector", "projector", False),
        ("embed_tokens", "embeddings", False),
        ("lm_head", "embeddings", True),
        ("norm", "norms", False),
        ("self_attn", "attention", True),
        ("router", "routers", False),
        ("shared_expert", "shared experts", True),
        ("experts", "routed experts", True),
        ("feed_forward", "dense MLPs", True),
    ]:
        if piece in name:
            return part, is_packed
    raise AssertionError(name)


def test_active_bytes_count_the_chosen_experts_only():
    counts = CONFIG.parameter_counts()
    assert weight_bytes(CONFIG)["active"] == 2 * counts["active"]
    assert weight_bytes(CONFIG)["total"] == 2 * counts["total"]
    biased = CONFIG.replace(attention_bias=True, tie_word_embeddings=True)
    counts = biased.parameter_counts()
    assert weight_bytes(biased)["total"] == 2 * counts["total"]
    assert weight_bytes(biased, head="int4") == weight_bytes(biased)  # the table is the read-out
    assert step_bytes(biased, weights="int4")["head"] == 2 * biased.vocab_size * biased.hidden_size


def test_cache_bytes_are_those_of_a_cache():
    model = tiny()
    cache = model.new_cache(batch_size=2)
    model(torch.ones(2, 7, dtype=torch.long), cache=cache)
    live = [torch.stack(layer.live(slice(None), 7)) for layer in cache.layers]
    assert cache_bytes(CONFIG, 7, 2) == sum(2 * kept.numel() for kept in live)
    assert cache_bytes(CONFIG, 7, 2, "fp8") == sum(kept.numel() for kept in live)
    model(torch.ones(2, 53, dtype=torch.long), cache=cache)  # buffers are of 64, or one chunk
    assert 2 * cache_bytes(CONFIG, 64, 2) == cache.bytes()  # in float32


@pytest.mark.parametrize("tokens", [0, 1, 8, 21])
def test_attention_flops_count_every_visible_pair(tokens):
    position = torch.arange(tokens)[None]
    pairs = sum(
        int(visible(position, position, CONFIG.attention_chunk(layer)).sum())
        for layer in range(CONFIG.num_hidden_layers)
    )
    assert attention_flops(CONFIG, tokens) == 4 * 6 * 16 * pairs


def test_token_flops_are_two_for_each_active_weight_that_multiplies():
    counts = CONFIG.parameter_counts()
    idle = counts["embeddings"] + counts["norms"]
    assert token_flops(CONFIG) == pytest.approx(2 * (counts["active"] - idle))


def test_distinct_experts_are_the_mean_over_all_routings():
    choices = list(itertools.combinations(range(4), 2))
    routings = list(itertools.product(choices, repeat=3))
    mean = sum(len(set().union(*routing)) for routing in routings) / len(routings)
    assert distinct_experts(4, 3, topk=2) == pytest.approx(mean)


def test_a_step_computes_as_much_for_each_row():
    one, eight = (SCOUT_INT4.decode(batch) for batch in (1, 8))
    assert eight.flops == 8 * one.flops
    # 2 · 16.13e9 and 48 · 4 · 5120 · 4096
    assert one.flops == pytest.approx(32.3e9 + 4.03e9, rel=percent(0.3))


def test_a_step_reads_the_experts_that_are_counted():
    half = step_bytes(l4.SCOUT, 64, 0, distinct=8)["routed experts"]
    assert half == weight_bytes(l4.SCOUT)["routed experts"] / 2
    assert Plan(l4.SCOUT, H200).decode(64, 1, distinct=8).bytes["routed experts"] == half


# ---- plans


@pytest.mark.parametrize("num_gpus", [1, 4])
def test_the_longest_context_fits_and_one_token_more_does_not(num_gpus):
    plan = Plan(l4.SCOUT, H100, num_gpus, weights="int4")
    longest = plan.longest_context(batch=3)
    assert plan.fits(3, longest)
    assert not plan.fits(3, longest + 1)


@pytest.mark.parametrize("precision", ["bf16", *KINDS])
def test_biases_of_attention_stay_in_bfloat16(precision):
    without, biased = (
        weight_bytes(CONFIG.replace(attention_bias=on), precision) for on in (False, True)
    )
    biases = 6 * (6 * 16 + 2 * 2 * 16 + 48)  # of queries, keys and values, and the output
    assert biased["attention"] - without["attention"] == pytest.approx(2 * biases)
    assert biased["total"] - without["total"] == pytest.approx(2 * biases)


def test_weights_that_do_not_fit_leave_no_context():
    assert Plan(l4.SCOUT, H100).longest_context() == 0


@pytest.mark.parametrize(
    ("changes", "possible", "sentence"),
    [
        ({}, [1, 2, 4, 8], "3 GPUs cannot share 8 key/value heads evenly; choose 1, 2, 4, 8"),
        ({"vocab_size": 202049}, [1], "8 GPUs cannot share 202049 tokens evenly; choose 1"),
        (
            {"intermediate_size": 8194},
            [1, 2],
            "4 GPUs cannot share 8194 neurons of an expert evenly; choose 1, 2",
        ),
        (
            {"moe_layers": (1, 3), "intermediate_size_mlp": 16388},
            [1, 2, 4],
            "8 GPUs cannot share 16388 neurons of an MLP evenly; choose 1, 2, 4",
        ),
    ],
)
def test_gpus_can_share_what_parallel_ranks_can_divide(changes, possible, sentence):
    config = l4.SCOUT.replace(**changes)
    assert possible_num_gpus(config) == possible
    for count in possible:
        check(config, count, "sliced")
    wrong = int(sentence.split()[0])
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Plan(config, H100, wrong)
    with pytest.raises(ValueError, match="cannot be divided among"):
        check(config, wrong, "sliced")


def test_several_gpus_share_all_but_what_each_must_hold():
    one, four = (Plan(l4.SCOUT, H100, n, weights="int4") for n in (1, 4))
    sizes = weight_bytes(l4.SCOUT, "int4")
    alone = sum(sizes[part] for part in ("norms", "routers", "vision encoder", "projector"))
    alone += 2 * l4.SCOUT.vocab_size * l4.SCOUT.hidden_size  # the table of embeddings
    assert one.needed()["weights"] == pytest.approx(sizes["total"])
    assert four.needed()["weights"] == pytest.approx((sizes["total"] - alone) / 4 + alone)
    assert four.needed()["cache"] == one.needed()["cache"] / 4
    assert four.decode().read_seconds == pytest.approx(one.decode().read_seconds / 4)


class TwoRanks(DeviceMesh):
    """What the first of two processes knows, without the other."""

    device_type, ndim = "cpu", 1

    def __init__(self):
        pass

    def size(self, mesh_dim=None):
        return 2

    def get_group(self, mesh_dim=None):
        return None

    def get_local_rank(self, mesh_dim=None):
        return 0


@pytest.mark.parametrize("experts", ["sliced", "placed"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_weights_of_a_plan_are_those_that_parallel_ranks_hold(kind, experts, tmp_path):
    changes = {"vocab_size": 98, "num_local_experts": 6, "num_attention_heads": 16}
    changes |= {"intermediate_size": 256, "intermediate_size_mlp": 256, "hidden_size": 256}
    for tied in (False, True):
        config = CONFIG.replace(**changes, tie_word_embeddings=tied)
        l4.save(l4.random(config).bfloat16(), tmp_path)
        model = l4.load(tmp_path, quantize=kind)
        planned = Plan(config, H100, 2, weights=kind or "bf16").needed()["weights"]
        parallel.parallelise(model, TwoRanks(), experts=experts)
        held = [*model.parameters(), *model.buffers()]
        scales = 0  # of rows that are divided: each rank has them whole
        if kind == "fp8":
            ends = ("o_proj.weight_scales", "down_proj.weight_scales")
            ends += ("experts.down_proj_scales",) if experts == "sliced" else ()
            scales = sum(x.nbytes for n, x in model.named_buffers() if n.endswith(ends)) / 2
            assert scales < planned / 100
        assert sum(x.nbytes for x in held) - scales == pytest.approx(planned, rel=1e-9)


def test_fp8_weights_multiply_at_the_fp8_rate_and_int4_at_bf16s():
    fp8, int4, bf16 = (Plan(l4.SCOUT, H200, weights=kind) for kind in ("fp8", "int4", "bf16"))
    assert int4.prefill().math_seconds == bf16.prefill().math_seconds
    assert fp8.prefill().math_seconds < 0.6 * bf16.prefill().math_seconds


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: find_gpu("h300"), f"unknown GPU 'h300'; choose {', '.join(GPUS)}"),
        (
            lambda: Plan(l4.SCOUT, H100, 3),
            "3 GPUs cannot share 8 key/value heads evenly; choose 1, 2, 4, 8",
        ),
        (
            lambda: Plan(l4.SCOUT, H100, weights="int3"),
            "unknown precision 'int3'; choose bf16, int8, int4, fp8",
        ),
        (lambda: bytes_per_weight("fp4", 8), "unknown precision 'fp4'; choose bf16, int8,"),
        (
            lambda: Plan(l4.SCOUT, H100, cache="int8"),
            f"unknown cache dtype 'int8'; choose {', '.join(CACHE_BYTES)}",
        ),
    ],
)
def test_what_cannot_be_planned_says_what_can(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)


# ---- as printed


def printed(capsys, *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_the_report_is_short_and_says_what_fits_how_fast_and_why(capsys):
    arguments = "--model scout --gpu h100 --quantize int4 --context 1,000,000"
    out = printed(capsys, *arguments.split())
    assert len(out.splitlines()) < 25
    longest = Plan(l4.SCOUT, H100, weights="int4").longest_context()
    assert f"DOES NOT FIT; the longest context is {longest:,} tokens" in out
    assert "49,152 bytes a token in 12 layers that see all, 1.21 GB in 36" in out
    assert "bound by memory: reading 8.33 GB of weights and 50.36 GB of cache" in out
    assert "bound by arithmetic: 156.1 GFLOP a token" in out
    assert "108,641,793,536" in out


def test_the_report_of_several_gpus_tells_what_they_say_to_each_other(capsys):
    arguments = "maverick --gpu h100 --num-gpus 8 --quantize fp8 --cache-dtype fp8 --batch 4"
    out = printed(capsys, *arguments.split())
    assert len(out.splitlines()) < 25
    assert "a GPU: fits; the longest context is 1,048,576 tokens, what the model is made for" in out
    assert "all-reduces an estimated" in out
    assert "4 rows of 8,192 tokens" in out


def test_the_cache_of_several_gpus_is_told_for_each(capsys):
    arguments = "scout --gpu h100 --num-gpus 4 --quantize int4"
    out = printed(capsys, *arguments.split())
    line = next(line for line in out.splitlines() if line.startswith("cache "))
    # a quarter of 49,152 bytes · 8192 tokens and of 1.208 GB
    assert line.endswith(
        "0.40 GB  12,288 bytes a token in 12 layers that see all, "
        "0.30 GB in 36 layers that see a chunk"
    )


def test_a_step_behind_a_chunks_border_is_said_to_read_less(capsys):
    less = "at the end of a chunk, where it reads the most; right behind one, 1.21 GB less"
    assert less in printed(capsys, "scout", "--gpu", "h100")
    assert "end of a chunk" not in printed(capsys, "scout", "--gpu", "h100", "--context", "8191")
    whole = Plan(l4.SCOUT, H100, weights="int4")
    faster = []
    for batch in (1, 8):
        read = whole.decode(batch, 8192).bytes
        chunks = batch * 36 * 8192 * 2 * 1024 * 2
        faster.append(sum(read.values()) / (sum(read.values()) - chunks) - 1)
    assert faster == pytest.approx([0.14, 0.34], abs=0.005)  # as the docstring of decode says


def test_a_model_without_layers_is_planned():
    config = CONFIG.replace(num_hidden_layers=0)
    assert "0 bytes a token in 0 layers" in plan_page.report(Plan(config, H100))


def test_a_model_made_for_few_tokens_is_planned_with_as_many(capsys):
    out = printed(capsys, "nano", "--gpu", "h100", "--batch", "3000")
    assert "3,000 rows of 2,048 tokens" in out
    assert "fits; the longest context is 2,048 tokens, what the model is made for" in out
    assert "bytes a token in 1 layer that sees all, " in out
    assert "GB in 3 layers that see a chunk" in out


def test_weights_that_leave_no_room_say_what_to_do(capsys):
    out = printed(capsys, "behemoth", "--gpu", "h100")
    assert out.startswith("AN ESTIMATE")
    assert "DOES NOT FIT; the weights leave no room for a context: take fewer bits or" in out


def test_the_page_of_tables_is_up_to_date():
    page = plan_page.table_page()
    assert PAGE.read_text(encoding="utf-8") == page, (
        "write it again: llama4-lab plan --table > docs/plan.md"
    )
    assert "| Behemoth (an estimate), " in page


@pytest.mark.parametrize("arguments", [["--table"], ["all"], ["--model", "all"]])
def test_the_tables_can_be_asked_for_in_several_ways(arguments, capsys, monkeypatch):
    monkeypatch.setattr(plan_page, "table_page", lambda: "the tables\n")
    assert printed(capsys, *arguments) == "the tables\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["scout", "--gpu", "abacus"], f"unknown GPU 'abacus'; choose {', '.join(GPUS)}\n"),
        (["scout", "--context", "9"], "--context says nothing without --gpu; choose a100, "),
        (["scout", "--num-gpus", "2"], "--num-gpus says nothing without --gpu; choose a100, "),
        ([], "plan needs a model, or --table\n"),
        (["scout", "--table"], "--table is about every preset: leave out --table, or scout\n"),
        (
            ["--table", "--quantize", "int4"],
            "--quantize says nothing about every preset on every GPU: leave it out, or name one",
        ),
        (["all", "--gpu", "h100"], "--gpu says nothing about every preset on every GPU: leave it"),
        (["--model", "all", "--batch", "2"], "--batch says nothing about every preset on every"),
        (
            ["nano", "--gpu", "h100", "--context", "99999999"],
            "the context of 99,999,999 tokens is too long: the model is made for 2,048 tokens only",
        ),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_sentence(arguments, sentence, capsys):
    assert cli.main(["plan", *arguments]) == 1
    assert sentence in capsys.readouterr().err


def test_a_length_that_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "scout", "--gpu", "h100", "--context", "-5"])
    assert "'-5' is no whole number of at least 1" in capsys.readouterr().err


def test_a_number_beyond_all_counts_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "scout", "--gpu", "h100", "--batch", "9" * 5000])
    assert "--batch: a number of 5000 digits is too large\n" in capsys.readouterr().err


def test_a_plan_for_nothing_is_refused():
    plan = Plan(l4.SCOUT, GPUS["h200"], 4)
    for ask in (lambda: plan.needed(batch=-1), lambda: plan.decode(0), lambda: plan.prefill(0)):
        with pytest.raises(ValueError, match="a plan is for rows and tokens, at least one of each"):
            ask()
