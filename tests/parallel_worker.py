"""What two processes check of one model that they share; `test_parallel` starts them by torchrun.

Every rank runs every check and compares with a whole model of its own. The first that fails ends
the job, because the ranks would no longer be in step.
"""

import json
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from mlx_folder import write_mlx
from test_edits import ALL, in_full, some_prompt
from test_intervene import other
from tiny import CONFIG, tiny
from torch.distributed.tensor.debug import CommDebugMode

import llama4_lab as l4
from llama4_lab import parallel
from llama4_lab.edits import Chunk, Rope, TopK, edited
from llama4_lab.generate import tokens
from llama4_lab.model.static import StaticDecoder
from llama4_lab.packed import KINDS
from llama4_lab.parallel import ranks

EVEN = {"vocab_size": 98, "num_local_experts": 6}  # CONFIG, so that two can share it
MODES = ("sliced", "placed")
CLOSE = {"atol": 1e-5, "rtol": 0}  # float32 sums in another order


def shared(mesh, mode, **changes):
    return parallel.parallelise(tiny(**EVEN, **changes), mesh, experts=mode)


def close(mine, whole):
    torch.testing.assert_close(mine, whole, **CLOSE)


def refuses(error, text, run):
    try:
        run()
    except error as found:
        assert text in str(found), f"{found} does not say {text!r}"
    else:
        raise AssertionError(f"nothing said {text!r}")


def logits_equal_one_process(mesh, folder):
    changes = {"attention_bias": True, "tie_word_embeddings": True}
    whole, biased = tiny(**EVEN), tiny(**EVEN, **changes)
    biased.embed_tokens.weight.mul_(CONFIG.hidden_size**-0.5)  # the size of a read-out's weights
    for name, parameter in biased.named_parameters():
        if name.endswith("bias"):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    ids = torch.randint(4, 89, (2, 29))
    pad = torch.arange(29) >= torch.tensor([[0], [11]])
    for mode in MODES:
        model = shared(mesh, mode)
        close(model(**some_prompt(0)), whole(**some_prompt(0)))
        expected = whole(ids, attention_mask=pad.long())
        for backend in ("auto", "loop", "grouped", "padded"):
            model.backend = backend
            close(model(ids, attention_mask=pad.long())[pad], expected[pad])
        model = tiny(**EVEN, **changes)
        model.load_state_dict(biased.state_dict())
        close(parallel.parallelise(model, mesh, experts=mode)(ids), biased(ids))


def each_rank_holds_half_of_the_bytes(mesh, folder):
    whole = dict(tiny(**EVEN).named_parameters())
    for mode in MODES:
        mine = dict(shared(mesh, mode).named_parameters())
        assert mine.keys() == whole.keys()
        for name, parameter in mine.items():
            is_cut = name == "lm_head.weight" or (
                name.startswith("layers.") and name.endswith(("proj", "proj.weight"))
            )
            assert parameter.nbytes * (2 if is_cut else 1) == whole[name].nbytes, name


def a_layer_takes_two_collectives(mesh, folder):
    ids = torch.randint(4, 89, (1, 9))
    for mode in MODES:
        model = shared(mesh, mode)
        with CommDebugMode() as collectives:
            model(ids)
        counts = {str(op): count for op, count in collectives.get_comm_counts().items()}
        # The logits are gathered, and sums of the inputs, to see that the ranks have the same.
        assert counts == {"c10d.allreduce_": 2 * CONFIG.num_hidden_layers, "c10d.allgather_": 2}


def decoding_equals_one_process_across_chunks(mesh, folder):
    ids = torch.randint(4, 89, (2, 29))
    expected = tiny(**EVEN)(ids)
    for mode in MODES:
        model = shared(mesh, mode)
        cache, whole = model.new_cache(2), tiny(**EVEN).new_cache(2)
        parts = [model(piece, cache=cache) for piece in ids.split([13, *[1] * 16], dim=1)]
        close(torch.cat(parts, dim=1), expected)
        tiny(**EVEN)(ids, cache=whole)
        assert cache.bytes() < 0.75 * whole.bytes()
        refuses(
            ValueError,
            "a cache for 2 key/value heads was given where each of 2 ranks holds 1: make it with "
            "model.new_cache()",
            lambda model=model, whole=whole: model(ids, cache=whole),
        )


def a_static_decoder_runs_the_models_layers(mesh, folder):
    ids = torch.randint(4, 89, (1, 12))
    expected = tiny(**EVEN)(ids)
    for mode in MODES:
        model = shared(mesh, mode)
        decoder = StaticDecoder(model, max_len=16, kernels="torch")
        close(decoder.prefill(ids[:, :5]), expected[:, 4])
        for t in range(5, 12):
            close(decoder.step(ids[:, t]), expected[:, t])
        refuses(
            ValueError,
            "kernels='triton' do not add up what 2 ranks compute: choose kernels='torch'",
            lambda model=model: StaticDecoder(model, kernels="triton"),
        )


def generation_takes_the_same_tokens_on_every_rank(mesh, folder):
    prompt = {"input_ids": torch.randint(4, 89, (2, 5))}
    model = shared(mesh, "sliced")
    greedy = [list(tokens(m, prompt, 12, temperature=0, stop=())) for m in (model, tiny(**EVEN))]
    assert torch.equal(*map(torch.stack, greedy))
    drawn = torch.stack(list(tokens(model, prompt, 12, temperature=2.0, top_p=1.0, stop=())))
    both = [torch.empty_like(drawn) for _ in range(2)]
    dist.all_gather(both, drawn)
    assert torch.equal(*both)


def a_trace_is_that_of_one_process(mesh, folder):
    whole, names = tiny(**EVEN), list(l4.points(tiny(**EVEN).config))
    with l4.trace(whole, names) as expected:
        whole(**some_prompt(0))
    for mode in MODES:
        model = shared(mesh, mode)
        with l4.trace(model, names) as cache:
            model(**some_prompt(0))
        assert cache.keys() == expected.keys()
        for name, value in cache.items():
            close(value, expected[name])
        with l4.trace(model, "layers.*.attn.z", heads=[5]) as one_head:
            model(**some_prompt(0))
        close(one_head["layers.3.attn.z"], expected["layers.3.attn.z"][:, :, 5:])


def a_change_at_every_point_does_what_it_does_on_one_process(mesh, folder):
    whole = tiny(**EVEN)
    names = [
        name for name in l4.points(whole.config) if name.startswith(("layers.2.mlp", "layers.3"))
    ]

    def changed(model, name):
        with l4.intervene(model, {name: other}):
            return model(**some_prompt(0))

    expected = {name: changed(whole, name) for name in [*names, "embed", "final_norm", "logits"]}
    for mode in MODES:
        model = shared(mesh, mode)
        for name, logits in expected.items():
            close(changed(model, name), logits)


def edits_and_replay_do_what_they_do_on_one_process(mesh, folder):
    whole, prompt = tiny(**EVEN), some_prompt(0)
    sources = {"clean": prompt, "other": some_prompt(1)}
    expected = [in_full(whole, prompt, sources, [edit]) for edit in ALL]
    for mode in MODES:
        model = shared(mesh, mode)
        replay = l4.Replay(model, prompt, {"other": some_prompt(1)})
        runs = replay.many([[edit] for edit in ALL])
        for i, (edit, run) in enumerate(zip(ALL, runs, strict=True)):
            close(run.logits, expected[i])
            assert run.effect.unseen == [], edit


def a_model_apart_has_rules_of_its_own(mesh, folder):
    whole, prompt = tiny(**EVEN), some_prompt(0)
    for mode in MODES:
        model = shared(mesh, mode)
        for apart in (model.apart(), model.apart().apart()):
            for edit in (TopK(3, 1), Rope(0, on=False), Chunk(1, 16)):
                with edited(apart, [edit]):
                    close(apart(**prompt)[0], in_full(whole, prompt, {}, [edit]))
                    close(model(**prompt), whole(**prompt))


def loading_and_seeding_make_only_this_ranks_part(mesh, folder):
    whole, copied = tiny(**EVEN), []
    if mesh.get_rank() == 0:
        l4.save(whole, folder / "tiny", max_shard_bytes=100_000)
        l4.convert(folder / "tiny", folder / "ours")
    dist.barrier()
    fill = ranks.fill
    ranks.fill = lambda target, source: (
        copied.append(target.nbytes),
        fill(target, source),
    )
    for mode in MODES:
        for name in ("tiny", "ours"):
            copied.clear()
            model = parallel.load(folder / name, mesh, experts=mode)
            assert sum(copied) == sum(p.nbytes for p in model.parameters())
            close(model(**some_prompt(0)), whole(**some_prompt(0)))
        seeded = parallel.random(whole.config, mesh, experts=mode)
        assert seeded.state_dict().keys() == model.state_dict().keys()
        for one, two in zip(seeded.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, two)
    ranks.fill = fill
    mini = parallel.load("mini", mesh, experts="placed")
    prompt = mini.prompt("What is")
    close(mini(**prompt), l4.load("mini")(**prompt))


def packed_weights_are_divided_too(mesh, folder):
    sizes = {"num_attention_heads": 16, "intermediate_size": 256, "intermediate_size_mlp": 256}
    if mesh.get_rank() == 0:
        l4.save(tiny(**EVEN, **sizes), folder / "plain")
        for kind in KINDS:
            l4.save(l4.load(folder / "plain", quantize=kind), folder / kind)
    dist.barrier()
    for kind in KINDS:
        whole = l4.load(folder / kind)
        held = {name: buffer.nbytes for name, buffer in whole.named_buffers()}
        expected = whole(**some_prompt(0))
        for mode in MODES:
            model = parallel.load(folder / kind, mesh, experts=mode)
            close(model(**some_prompt(0)), expected)
            for name, buffer in model.named_buffers():
                if name.endswith("_codes"):
                    assert 2 * buffer.nbytes == held[name]
        model = parallel.parallelise(whole, mesh)
        close(model(**some_prompt(0)), expected)
    small = l4.load(folder / "tiny", quantize="int8")
    refuses(
        ValueError,
        "layers.0.self_attn.o_proj.weight has rows of 3 groups of packed weights, which cannot be "
        "divided among 2 ranks: take weights that are not packed, or other ranks",
        lambda: parallel.parallelise(small, mesh),
    )


def another_programs_codes_are_divided_too(mesh, folder):
    if mesh.get_rank() == 0:
        l4.save(tiny(**EVEN, hidden_size=64), folder / "wide")
        write_mlx(folder / "wide", folder / "mlx", "affine")
    dist.barrier()
    expected = l4.load(folder / "mlx")(**some_prompt(0))
    for mode in MODES:
        close(parallel.load(folder / "mlx", mesh, experts=mode)(**some_prompt(0)), expected)


def what_cannot_be_is_refused(mesh, folder):
    model, rank = shared(mesh, "sliced"), mesh.get_rank()
    refuses(
        ValueError,
        "the ranks were given different input_ids: run the same lines on each, with the same seeds",
        lambda: model(torch.tensor([[4, 5 + rank]])),
    )
    prompts = ([[5, 7]], [[7, 6]]), ([[5, 0, 7]], [[0, 6, 7]]), ([[5, 7]], [[5], [7]])
    for both in prompts:  # of one weighted sum, and of one row after the other
        refuses(
            ValueError,
            "the ranks were given different input_ids: run the same lines on each, with the same "
            "seeds",
            lambda both=both: model(torch.tensor(both[rank])),
        )
    refuses(
        ValueError,
        "this rank holds a part of the model, one of 2: save it from the process of a model that "
        "was loaded whole",
        lambda: l4.save(model, folder / f"part {rank}"),
    )
    wanted = {"embed": lambda value: value.requires_grad_()}
    with torch.enable_grad(), l4.intervene(model, wanted):
        refuses(
            RuntimeError,
            "gradients do not cross ranks: run a parallel model under torch.no_grad(), or load it "
            "whole on one device",
            lambda: model(torch.tensor([[4, 5]])),
        )
    in_files = l4.load(folder / "tiny", experts="mmap")
    refuses(
        ValueError,
        "this model's experts stay in their files, which ranks cannot divide: load it with "
        "llama4_lab.parallel.load",
        lambda: parallel.parallelise(in_files, mesh),
    )
    refuses(
        ValueError,
        "this model is divided among 2 ranks already",
        lambda: parallel.parallelise(model, mesh),
    )
    for mode in MODES:
        model = shared(mesh, mode)
        model.backend = "fast"
        refuses(
            ValueError,
            "unknown backend 'fast'; choose auto, loop, numba, gather, grouped, padded, triton",
            lambda model=model: model(torch.tensor([[4, 5]])),
        )
    refuses(
        ValueError,
        "experts='split' is unknown; choose sliced or placed",
        lambda: parallel.parallelise(tiny(), mesh, experts="split"),
    )


CHECKS = [
    logits_equal_one_process,
    each_rank_holds_half_of_the_bytes,
    a_layer_takes_two_collectives,
    decoding_equals_one_process_across_chunks,
    a_static_decoder_runs_the_models_layers,
    generation_takes_the_same_tokens_on_every_rank,
    a_trace_is_that_of_one_process,
    a_change_at_every_point_does_what_it_does_on_one_process,
    edits_and_replay_do_what_they_do_on_one_process,
    a_model_apart_has_rules_of_its_own,
    loading_and_seeding_make_only_this_ranks_part,
    packed_weights_are_divided_too,
    another_programs_codes_are_divided_too,
    what_cannot_be_is_refused,
]


@torch.no_grad()
def main(folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    mesh = parallel.start(device="cpu")
    report = folder / f"report{mesh.get_rank()}.jsonl"
    for check in CHECKS:
        torch.manual_seed(0)
        begin, error = time.perf_counter(), None
        try:
            check(mesh, folder)
        except Exception:
            error = traceback.format_exc()
        line = {"check": check.__name__, "seconds": time.perf_counter() - begin, "error": error}
        with report.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if error:
            sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
