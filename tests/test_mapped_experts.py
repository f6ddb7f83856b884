"""Experts that stay in their files: the same logits, few reads, a limit on memory."""

import copy
import gc
import io
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab.checkpoint import convert, files
from llama4_lab.experts import mapped
from llama4_lab.experts.mapped import ExpertMemory

IDS = torch.arange(5, 29)[None] % 89
GATE_UP, DOWN = 80 * 48 * 4, 48 * 40 * 4  # bytes of an expert of `tiny`, in float32
LAYER = 5 * (GATE_UP + DOWN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    l4.save(tiny(), folder, max_shard_bytes=150_000)
    return folder


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
    """The same checkpoint in Hugging Face's layout, in ours, and in few bits."""
    found = {None: folder}
    for kind in ("ours", "int8", "int4", "fp8"):
        found[kind] = tmp_path_factory.mktemp(kind)
        quantize = None if kind == "ours" else kind
        convert(folder, found[kind], quantize=quantize, max_shard_bytes=40_000)
    return found


def resident(folder, **options):
    model = l4.load(folder, **options)
    model.backend = "loop"  # experts in files are computed with so
    return model


@pytest.mark.parametrize("kind", [None, "ours", "int8", "int4", "fp8"])
@torch.no_grad()
def test_logits_are_those_of_the_resident_model_to_the_bit(folders, kind):
    model = l4.load(folders[kind], experts="mmap")
    assert torch.equal(model(IDS), resident(folders[kind])(IDS))
    assert not any("experts" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_an_expert_of_our_own_layout_is_where_it_was_read_to(folders, monkeypatch):
    copies, pages = [], mapped.pages
    monkeypatch.setattr(mapped, "pages", lambda *of: copies.append(of) or pages(*of))
    for kind, count in ((None, 1), ("ours", 0)):
        copies.clear()
        experts = l4.load(folders[kind], experts="mmap").layers[1].feed_forward.experts
        assert experts.gate_up_proj[2].shape == (80, 48) and len(copies) == count


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "ours"])
def test_another_dtype_is_converted_while_reading(folders, kind):
    folder = folders[kind]
    model = l4.load(folder, experts="mmap", dtype=torch.bfloat16)
    expected = resident(folder, dtype=torch.bfloat16)
    assert torch.equal(model(IDS), expected(IDS))
    later = l4.load(folder, experts="mmap")
    later(IDS)
    assert torch.equal(later.bfloat16()(IDS), expected(IDS))


@torch.no_grad()
def test_only_experts_that_tokens_ask_for_are_read(folder):
    model = l4.load(folder, experts="mmap", memory_limit=0)
    with l4.trace(model, "layers.*.router.indices") as cache:
        model(IDS[:, :2])
    asked = sum(len(chosen.unique()) for chosen in cache.values())
    assert asked < 3 * 5
    assert model.expert_memory.bytes_read == asked * (GATE_UP + DOWN)
    assert model.expert_memory.bytes_held == 0


@pytest.mark.parametrize("kind", [None, "ours", "int4"])
def test_experts_read_where_nothing_takes_gradients_serve_where_something_does(folders, kind):
    model = l4.load(folders[kind], experts="mmap", memory_limit=3 * LAYER)
    with torch.inference_mode():
        expected = model(IDS)
    logits = model(IDS)
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert model.embed_tokens.weight.grad.any()


@torch.no_grad()
def test_within_the_limit_nothing_is_read_twice(folder):
    model = l4.load(folder, experts="mmap", memory_limit=3 * LAYER)
    model(IDS)
    once = model.expert_memory.bytes_read
    assert once == model.expert_memory.bytes_held <= 3 * LAYER
    model(IDS)
    assert model.expert_memory.bytes_read == once
    usual = l4.load(folder, experts="mmap")
    assert usual.expert_memory.limit == 2 * LAYER
    for _ in range(2):
        usual(IDS)
        assert usual.expert_memory.bytes_held <= 2 * LAYER


def test_what_was_used_longest_ago_goes_first():
    memory = ExpertMemory(limit=3 * 16)
    read = []

    def get(key, size=4):
        def value():
            read.append(key)
            return torch.zeros(size), 4 * size

        return memory.get(key, 4 * size, value)

    for key in "abcabd":  # d takes the place of c
        get(key)
        assert memory.bytes_held <= memory.limit
    assert read == list("abcd")
    get("a"), get("b"), get("d")
    assert read == list("abcd")
    get("c")  # in the place of a
    get("a")
    assert read == list("abcdca")
    assert memory.bytes_read == 6 * 16 and memory.bytes_held == 48
    get("large", size=100)  # does not fit: it is handed out and not kept
    assert memory.bytes_held == 0
    memory.clear()
    get("a")
    assert read[-1] == "a" and memory.bytes_held == 16


def test_what_is_asked_for_next_is_read_meanwhile():
    memory = ExpertMemory(limit=2 * 16)
    begun, may_end, readers = threading.Event(), threading.Event(), []

    def value():
        readers.append(threading.current_thread())
        begun.set()
        assert may_end.wait(60)
        return torch.ones(4), 16

    memory.read_ahead("a", 16, value)
    assert begun.wait(60) and memory.bytes_read == 0  # and here something is computed
    may_end.set()
    assert memory.get("a", 16, value).sum() == 4
    memory.read_ahead("a", 16, value)  # it is there
    memory.read_ahead("large", 48, value)  # it would be read for nothing, and all others go
    assert memory.get("a", 16, value).sum() == 4
    assert len(readers) == 1 and readers[0] is not threading.current_thread()
    assert memory.bytes_held == memory.bytes_read == 16


def test_who_asks_is_told_why_nothing_could_be_read_before():
    memory = ExpertMemory(limit=2 * 16)

    def broken():
        raise OSError("the disk is gone")

    memory.read_ahead("a", 16, broken)
    with pytest.raises(OSError, match="the disk is gone"):
        memory.get("a", 16, broken)
    assert memory.get("a", 16, lambda: (torch.ones(4), 16)).sum() == 4


@torch.no_grad()
def test_experts_are_read_in_the_order_in_which_they_are_computed_with(folder, monkeypatch):
    model = l4.load(folder, experts="mmap", memory_limit=2 * GATE_UP)
    experts, ahead = model.layers[1].feed_forward.experts, []
    read_ahead = ExpertMemory.read_ahead
    monkeypatch.setattr(
        ExpertMemory,
        "read_ahead",
        lambda memory, *of: ahead.append(of[0]) or read_ahead(memory, *of),
    )
    each = experts.gate_up_proj.in_turn([0, 2, 3])
    for expert, weight in zip([0, 2, 3], each, strict=True):
        assert torch.equal(weight, experts.gate_up_proj[expert])
    assert [key[1] for key in ahead] == [2, 3]
    assert list(experts.gate_up_proj.in_turn([])) == []
    assert len(list(experts.down_proj.in_turn([4]))) == 1 and len(ahead) == 2


@torch.no_grad()
def test_a_layers_experts_are_read_once_for_all_edited_runs(folder):
    model, other = l4.load(folder, experts="mmap", memory_limit=LAYER), resident(folder)
    everywhere = [[l4.edits.Scale("embed", 1 + i / 40)] for i in range(16)]
    somewhere = [[l4.edits.Scale("embed", 2, tokens=(i,))] for i in range(16)]
    replay = l4.Replay(model, {"input_ids": IDS})
    before = model.expert_memory.bytes_read
    found = replay.many(everywhere + somewhere)
    assert model.expert_memory.bytes_read - before <= 1.5 * before
    theirs = l4.Replay(other, {"input_ids": IDS})
    expected = theirs.many(everywhere) + theirs.many(somewhere)
    for mine, alone in zip(found, expected, strict=True):  # other batches, other last bits
        torch.testing.assert_close(mine.logits, alone.logits, atol=2e-5, rtol=1e-4)
    same = l4.Replay(model, {"input_ids": IDS}).many(everywhere)
    for mine, alone in zip(same, expected[:16], strict=True):
        assert torch.equal(mine.logits, alone.logits)
    # Several prompts in one pass are read for once, too.
    alone = l4.load(folder, experts="mmap", memory_limit=0)
    alone(torch.cat([IDS, IDS.flip(1)]))
    assert alone.expert_memory.bytes_read <= 3 * LAYER


@torch.no_grad()
def test_values_inside_experts_can_be_watched_and_changed(folder):
    model, other = l4.load(folder, experts="mmap"), resident(folder)
    with l4.trace(model, "*") as found, l4.trace(other, "*") as expected:
        model(IDS), other(IDS)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    with l4.intervene(model, {"layers.3.experts.hidden": torch.zeros_like}):
        assert not torch.equal(model(IDS), found["logits"])


def test_gradients_reach_the_embeddings(folder):
    model, other = l4.load(folder, experts="mmap"), resident(folder)
    for each in (model, other):
        each(IDS)[0, -1, 3].backward()
    assert torch.equal(model.embed_tokens.weight.grad, other.embed_tokens.weight.grad)


@torch.no_grad()
def test_decoding_and_copies_work(folder):
    model = l4.load(folder, experts="mmap")
    cache = model.new_cache()
    parts = [model(part, cache=cache) for part in IDS.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(IDS), atol=2e-5, rtol=1e-4)
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))


@pytest.mark.parametrize("kind", [None, "ours", "int8", "int4", "fp8"])
@torch.no_grad()
def test_a_model_can_be_sent_to_another_process(folders, kind):
    model = l4.load(folders[kind], experts="mmap", memory_limit=LAYER)
    before, sent = model(IDS), io.BytesIO()
    torch.save(model, sent)
    sent.seek(0)
    again = torch.load(sent, weights_only=False)
    assert (again.expert_memory.limit, again.expert_memory.bytes_read) == (LAYER, 0)
    assert torch.equal(again(IDS), before)
    assert 0 < again.expert_memory.bytes_held <= LAYER
    assert len(sent.getvalue()) < sum(f.stat().st_size for f in folders[kind].iterdir())


def test_what_cannot_be_done_is_explained(folder, folders, tmp_path):
    from llama4_lab.analysis.quantisation import rounded

    model = l4.load(folder, experts="mmap")
    with pytest.raises(ValueError, match=r"stay in the folder that it was loaded from: copy that"):
        l4.save(model, tmp_path)
    sentence = r"^rounding takes plain weights in memory, but layers\.1\.feed_forward\.experts\."
    refused = pytest.raises(ValueError, match=sentence + "gate_up_proj is in a file")
    with refused, rounded(model, 1, "int8"):
        pass
    with pytest.raises(ValueError, match=r"^experts='disk': give 'mmap'"):
        l4.load(folder, experts="disk")
    with pytest.raises(ValueError, match=r"^experts=None: give 'mmap'.*memory_limit is for"):
        l4.load(folder, memory_limit=5)
    with pytest.raises(ValueError, match=r"^memory_limit=-1: give bytes, a whole number from 0 up"):
        l4.load(folder, experts="mmap", memory_limit=-1)
    with pytest.raises(ValueError, match=r"convert .* TARGET --quantize int4`, and load TARGET"):
        l4.load(folder, experts="mmap", quantize="int4")
    assert l4.load(folders["int4"], experts="mmap", quantize="int4").expert_memory is not None
    l4.save(tiny(interleave_moe_layer_step=99), tmp_path / "dense")
    with pytest.raises(ValueError, match=r"^this model has no experts that could stay"):
        l4.load(tmp_path / "dense", experts="mmap")


@torch.no_grad()
def test_an_expert_is_whole_however_little_the_system_reads_at_once(folder, monkeypatch):
    read, calls = files.Held._read, []

    def some(self, room, start):  # Linux reads 2 GiB at most
        calls.append(start)
        return read(self, room[:5000], start)

    monkeypatch.setattr(files.Held, "_read", some)
    model = l4.load(folder, experts="mmap", memory_limit=0)
    calls.clear()
    expert = model.layers[1].feed_forward.experts.down_proj[3]
    assert torch.equal(expert, resident(folder).layers[1].feed_forward.experts.down_proj[3])
    assert len(calls) == -(-expert.nbytes // 5000) > 1


def test_a_file_is_open_once_for_all_that_is_read_from_it(folder, tmp_path):
    (tmp_path / "other").symlink_to(folder)  # many experts would be more files than may be open
    file = next(folder.glob("*.safetensors"))
    held = files.Held.of(file)
    assert files.Held.of(file) is files.Held.of(tmp_path / "other" / file.name) is held


@pytest.mark.parametrize("has_preadv", [True, False])
@torch.no_grad()
def test_a_file_that_was_cut_is_noticed(folder, tmp_path, monkeypatch, has_preadv):
    if not has_preadv:  # as on Windows and macOS before 11
        monkeypatch.delattr(os, "preadv", raising=False)
        model = l4.load(folder, experts="mmap", memory_limit=0)
        assert torch.equal(model(IDS), resident(folder)(IDS))
    l4.save(tiny(vision_config=None), tmp_path)
    model = l4.load(tmp_path, experts="mmap", memory_limit=0)
    file = tmp_path / "model.safetensors"
    read = model.layers[1].feed_forward.experts.down_proj.read
    os.truncate(file, file.stat().st_size // 50)  # the mapped weights are not touched any more
    with pytest.raises(OSError, match=r"model\.safetensors is shorter than it was: 7680 bytes"):
        read(4)


@pytest.mark.parametrize("kind", [None, "int8"])
@torch.no_grad()
def test_a_checkpoint_that_takes_the_folder_later_is_another(folders, tmp_path, kind):
    shutil.copytree(folders[kind], tmp_path, dirs_exist_ok=True)
    model = l4.load(tmp_path, experts="mmap", memory_limit=0)
    held = [each.file.name for each in files._HELD.values()]
    held = [file for file in held if file.parent == tmp_path]
    assert 0 < len(held) == len(set(held)) <= len(list(tmp_path.glob("*.safetensors")))
    before = model(IDS)
    l4.save(tiny(seed=1), tmp_path, max_shard_bytes=40_000)
    for each in (model, copy.deepcopy(model)):
        assert torch.equal(each(IDS), before)
    del model, each
    gc.collect()
    assert not any(each.file.name.parent == tmp_path for each in files._HELD.values())


@torch.no_grad()
def test_copies_of_another_dtype_have_experts_of_their_own(folder):
    model = l4.load(folder, experts="mmap")
    other = copy.deepcopy(model).bfloat16()
    before = model(IDS)
    assert other(IDS).dtype == torch.bfloat16
    assert torch.equal(model(IDS), before)


_RESIDENT = """
import sys, torch
from pathlib import Path
import llama4_lab as l4

def resident(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024

ids = torch.arange(64)[None]
with torch.no_grad():
    l4.load(sys.argv[3], experts="mmap")(ids)  # brings in the code
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = l4.load(sys.argv[1], experts="mmap", memory_limit=int(sys.argv[2]))
    model(ids), model(ids)
print(resident("VmHWM") - before)
"""


@torch.no_grad()
def test_the_limit_is_that_of_resident_memory(folder, tmp_path):
    config = CONFIG.replace(
        hidden_size=256, intermediate_size=512, num_local_experts=16, num_experts_per_tok=1,
        num_hidden_layers=8, interleave_moe_layer_step=1, vision_config=None,
    )  # fmt: skip
    model = l4.random(config)
    l4.save(model, tmp_path)
    layer = 16 * 3 * 256 * 512 * 4
    others = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name)
    command = [sys.executable, "-c", _RESIDENT, str(tmp_path), str(layer), str(folder)]
    found = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # 8 layers of 25 MB; beside one of them the weights that are no experts, the matrix that is
    # computed with and what it was transposed from, and a few MB of activations and of the heap.
    assert found < layer + others + 2 * 2 * 256 * 512 * 4 + 16e6
    assert found < 3 * layer
