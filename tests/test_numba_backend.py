"""The compiled experts of the CPU: one call for few tokens, rows or a library for more."""

import importlib
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

from llama4_lab import compiled, experts, intervene, loading, packed, trace
from llama4_lab.experts import numba, probe
from llama4_lab.points import Tap

D, FF, E = 20, 12, 5
EVERYTHING = ["layers.*.router.*", "layers.*.shared.out", "layers.*.experts.*"]


def layer(e=E, dtype=torch.float32):
    def random(*shape):
        return (torch.randn(shape) / 3).to(dtype)

    shared = random(FF, D), random(FF, D), random(D, FF)
    return random(e, D), (random(e, 2 * FF, D), random(e, D, FF)), shared


@pytest.fixture
def library(monkeypatch):
    """Make every expert go by the library."""

    def use(name):
        monkeypatch.setitem(probe.DEFAULT, torch.float32, probe.Best(0, name))

    return use


@pytest.mark.parametrize("topk", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 16, 41, 150])  # rows, a vector, panels, many panels
@torch.no_grad()
def test_one_call_for_few_tokens_equals_the_loop(n, topk):
    x, weights = torch.randn(n, D), layer()
    assert numba.takes(x, weights[0], *weights[1], *weights[2])
    expected = experts.moe(x, *weights, topk=topk, backend="loop")
    found = experts.moe(x, *weights, topk=topk, backend="numba")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Watcher(Tap):
    """Keeps all values; may say that it changes none, as a trace does."""

    def __init__(self, records=None):
        self.seen = {}
        self.records = lambda: records

    def watches(self, name):
        return True

    def __call__(self, name, value):
        self.seen[name] = value
        return value


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("n, e", [(40, 5), (65, 1), (95, 5), (300, 2), (700, 16)])
@torch.no_grad()
def test_several_threads_give_what_one_gives_to_the_bit(n, e, threads, monkeypatch):
    x, weights = torch.randn(n, D), layer(e)
    given = x, *experts.sort(torch.randint(e, (n, 1)), e), torch.rand(n, 1), *weights[1]

    def results():
        taps = Watcher(), Watcher(())
        whole = [experts.moe(x, *weights, backend="numba", record=tap) for tap in taps]
        seen = [value for tap in taps for value in tap.seen.values()]
        return [*whole, *seen, numba.run(*given, probe.Best(9, "linear")), numba.apply(*given)]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected, used = results(), set()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(compiled, "_PRODUCTS_A_THREAD", 1)
    beside = numba.beside

    def note(calls):
        calls = list(calls)
        used.add(len(calls))
        beside(calls)

    monkeypatch.setattr(numba, "beside", note)
    assert all(map(torch.equal, results(), expected))
    assert max(used) >= threads


def test_sorting_refuses_experts_that_do_not_exist():
    assert numba.sort(torch.tensor([[1], [0]]), 2)[0].tolist() == [1, 0]
    for expert in (9, -1):
        with pytest.raises(ValueError, match=rf"expert {expert} is out of range: .* 5 \(0 to 4\)"):
            numba.sort(torch.tensor([[1], [expert]]), 5)


@torch.no_grad()
def test_several_choices_of_a_token_are_added_up_on_one_thread(monkeypatch):
    x, weights = torch.randn(300, D), layer()
    expected = experts.moe(x, *weights, topk=2, backend="numba")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(compiled, "_PRODUCTS_A_THREAD", 1)
    assert torch.equal(experts.moe(x, *weights, topk=2, backend="numba"), expected)


@torch.no_grad()
def test_a_token_may_choose_an_expert_twice_on_several_threads(monkeypatch):
    x, weights = torch.randn(300, D), layer()

    class Twice(Tap):
        def __call__(self, name, value):
            return torch.zeros_like(value) if name == "router.indices" else value

        def watches(self, name):
            return False

    expected = experts.moe(x, *weights, topk=2, backend="loop", record=Twice())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(compiled, "_PRODUCTS_A_THREAD", 1)
    found = experts.moe(x, *weights, topk=2, backend="numba", record=Twice())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 40])
@torch.no_grad()
def test_defaults_of_torch_do_not_matter(n, dtype):
    x, weights = torch.randn(n, D), layer()
    half = layer(dtype=torch.bfloat16)

    def results(backend):
        return (
            experts.moe(x, *weights, backend=backend),
            experts.moe(x.bfloat16(), *half, backend=backend).float(),
        )

    expected = results("loop")
    torch.set_default_dtype(dtype)
    try:
        numba.prepare()
        found = results("numba")
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    # bfloat16 keeps 8 bits, and rounds what is between in the loop.
    torch.testing.assert_close(found[1], expected[1], atol=0.05 * expected[1].std().item(), rtol=0)


@torch.no_grad()
def test_what_torch_func_looks_at_is_left_to_torch():
    x, weights = torch.randn(6, D), layer()

    def block(backend):
        return lambda x: experts.moe(x, *weights, backend=backend)

    found, expected = (
        torch.func.jvp(block(backend), (x,), (torch.ones_like(x),)) for backend in ("numba", "loop")
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system copies no processes")
def test_a_copy_of_the_process_has_threads_of_its_own():
    code = """
import os
from llama4_lab.compiled import beside
beside([lambda: None, lambda: None])
if (child := os.fork()) == 0:
    done = []
    beside([lambda: done.append(1), lambda: done.append(2)])
    os._exit(len(done))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=120)
    assert said.split() == ["2"]


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("n", [1, 7, 16, 41, 300])
@torch.no_grad()
def test_values_inside_the_experts_are_shown_by_the_kernels_themselves(n, topk):
    x, weights, taps = torch.randn(n, D), layer(), [Watcher(), Watcher(), Watcher(())]
    plain = experts.moe(x, *weights, topk=topk, backend="numba")
    experts.moe(x, *weights, topk=topk, backend="loop", record=taps[0])
    for tap in taps[1:]:
        found = experts.moe(x, *weights, topk=topk, backend="numba", record=tap)
        assert torch.equal(found, plain)
        assert tap.seen.keys() == taps[0].seen.keys()
        for name, value in taps[0].seen.items():
            torch.testing.assert_close(tap.seen[name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("n", [7, 16, 41, 150])
@torch.no_grad()
def test_bfloat16_weights_are_read_as_they_lie(n, monkeypatch):
    monkeypatch.setitem(probe.DEFAULT, torch.bfloat16, probe.Best(200, "linear"))
    x, weights = torch.randn(n, D).bfloat16(), layer(dtype=torch.bfloat16)
    found = experts.moe(x, *weights, backend="numba").float()
    exact = [tuple(w.float() for w in each) for each in weights[1:]]
    expected = experts.moe(x.float(), weights[0].float(), *exact, backend="loop")
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_nan_stays_with_its_token():
    x, weights = torch.randn(40, D), layer(e=1)
    x[5, 3] = torch.nan
    found = experts.moe(x, *weights, backend="numba")
    assert found[5].isnan().all()
    assert not found[torch.arange(40) != 5].isnan().any()


@pytest.mark.parametrize("name", ["linear", "transposed", "onednn"])
@torch.no_grad()
def test_every_library_equals_the_loop(name, library):
    library(name)
    x, weights = torch.randn(40, D), layer()
    expected = experts.moe(x, *weights, topk=2, backend="loop")
    found = experts.moe(x, *weights, topk=2, backend="numba")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_compiled_token_equals_the_loop_and_says_what_it_chose():
    x, (router, pair, shared) = torch.randn(D), layer()
    hidden, logits, scores, out = (np.empty(k, np.float32) for k in (2 * FF, E, 2, D))
    indices = np.empty(2, np.int64)
    weights = [w.numpy() for w in (router, *pair, *shared)]
    numba.token(x.numpy(), *weights, hidden, logits, scores, indices, out)
    expected = experts.moe(x[None], router, pair, shared, topk=2, backend="loop")[0]
    torch.testing.assert_close(torch.from_numpy(out), expected, atol=1e-5, rtol=1e-5)
    chosen, score = experts.route(F.linear(x, router)[None], 2)
    assert indices.tolist() == chosen[0].tolist()
    torch.testing.assert_close(torch.from_numpy(scores), score[0])
    torch.testing.assert_close(torch.from_numpy(logits), F.linear(x, router))


def test_the_counting_sort_equals_the_plain_one():
    chosen = torch.randint(0, 7, (33, 2))
    for found, expected in zip(numba.sort(chosen, 9), experts.sort(chosen, 9), strict=True):
        assert found.tolist() == expected.tolist()


def test_the_sigmoid_is_exact_to_rounding_and_keeps_nan():
    logits = torch.tensor([-200.0, -86, -3.3, 0, 1e-3, 5, 87, 300, torch.nan])
    found = torch.tensor([numba.sigmoid(np.float32(x)) for x in logits.tolist()])
    torch.testing.assert_close(found, logits.sigmoid(), atol=1e-37, rtol=1e-6, equal_nan=True)


def test_a_nan_logit_is_chosen_first_as_in_torch():
    logits = torch.tensor([1.0, torch.nan, 3.0])
    indices = np.empty(2, np.int64)
    numba.choose(logits.numpy(), indices)
    assert indices.tolist() == logits.topk(2).indices.tolist() == [1, 2]


@torch.no_grad()
def test_tracing_and_changing_nothing_leave_the_logits_as_they_are_to_the_bit():
    model, ids = tiny(), torch.tensor([[5, 7, 11, 13]])
    model.backend = "numba"
    plain = model(ids)
    with trace(model, EVERYTHING) as cache:
        assert torch.equal(model(ids), plain)
    with intervene(model, dict.fromkeys(EVERYTHING, lambda value: value)):
        assert torch.equal(model(ids), plain)
    model.backend = "loop"
    with trace(model, EVERYTHING) as expected:
        model(ids)
    assert cache.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(cache[name], value, atol=1e-5, rtol=1e-5)


CHANGES = {
    "router.logits": lambda value: value.flip(-1),
    "router.indices": lambda value: (value + 1) % 5,
    "router.scores": lambda value: value / 2,
    "shared.out": lambda value: value * 0,
    "experts.in": lambda value: value / 2,
    "experts.hidden": lambda value: value.flip(-1),
    "experts.out": lambda value: value.mul_(3),
}


@pytest.mark.parametrize("point", CHANGES)
@torch.no_grad()
def test_what_follows_from_a_changed_value_is_computed_anew(point):
    model, ids = tiny(), torch.tensor([[5, 7, 11, 13]])
    found = {}
    for model.backend in ("loop", "numba"):
        with intervene(model, {f"layers.1.{point}": CHANGES[point]}), trace(model, EVERYTHING) as c:
            found[model.backend] = {"logits": model(ids), **c}
    model.backend = "numba"
    assert (found["numba"]["logits"] - model(ids)).abs().max() > 1e-4
    for name, value in found["loop"].items():
        torch.testing.assert_close(found["numba"][name], value, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_who_only_watches_experts_beside_a_change_is_shown_the_kernels_values(monkeypatch):
    model, ids, names = tiny(), torch.tensor([[5, 7, 11, 13]]), "layers.1.experts.*"
    change = {"layers.1.router.scores": lambda value: value / 2}
    for model.backend in ("loop", "numba"):
        with intervene(model, change), trace(model, names) as found:
            model(ids)
        if model.backend == "loop":
            expected = found
            monkeypatch.setattr(experts.loop, "apply", None)
    assert len(found) == 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_expert_that_does_not_exist_is_refused():
    class Wrong(Tap):
        def __call__(self, name, value):
            return torch.full_like(value, 99) if name == "router.indices" else value

    with pytest.raises(RuntimeError, match="index 99 is out of bounds"):
        experts.moe(torch.randn(2, D), *layer(), backend="numba", record=Wrong())


def test_gradients_take_the_plain_path():
    x, weights = torch.randn(3, D, requires_grad=True), layer()
    assert not numba.takes(x, weights[0], *weights[1], *weights[2])
    (found,) = torch.autograd.grad(experts.moe(x, *weights, backend="numba").sum(), x)
    (expected,) = torch.autograd.grad(experts.moe(x, *weights, backend="loop").sum(), x)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert numba.takes(x, weights[0], *weights[1], *weights[2])


@torch.no_grad()
def test_kernels_refuse_what_they_cannot_read():
    x, weights = torch.randn(3, D), layer()
    assert numba.can_run(x, *weights[1])
    assert not numba.can_run(x, weights[1][0].mT)
    assert not numba.can_run(x.double(), weights[1][0].double())
    assert not numba.can_run(x, weights[1][0].bfloat16())
    assert not numba.takes(x.bfloat16(), *(w.bfloat16() for w in weights[2]))


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """Probe as a user's process does, with a cache folder of its own and a quick measure."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "CHOSEN", "auto")
    monkeypatch.setattr(probe, "measure", lambda dtype: probe.Best(7, "linear"))
    probe._measured.cache_clear()
    yield tmp_path
    probe._measured.cache_clear()


def test_what_was_measured_is_kept_for_the_next_process(cache_folder, monkeypatch):
    assert probe.best(torch.float32) == probe.Best(7, "linear")
    (file,) = (cache_folder / "llama4_lab").iterdir()
    monkeypatch.delattr(probe, "measure")
    probe._measured.cache_clear()
    assert probe.best(torch.bfloat16) == probe.Best(7, "linear")
    assert json.loads(file.read_text()).keys() == {"torch.float32", "torch.bfloat16"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"torch.float32": {"rows": 3}}'])
def test_a_damaged_file_is_measured_anew(cache_folder, text):
    path = probe._path()
    path.parent.mkdir()
    path.write_text(text)
    assert probe.best(torch.float32) == probe.Best(7, "linear")
    assert "torch.bfloat16" in json.loads(path.read_text())


def test_a_folder_that_cannot_be_written_does_no_harm(cache_folder):
    (cache_folder / "llama4_lab").write_text("a file in the place of the folder")
    assert probe.best(torch.float32) == probe.Best(7, "linear")


@pytest.mark.parametrize("library", ["linear", "onednn"])
def test_other_products_are_told_which_library_is_ahead(cache_folder, library, monkeypatch):
    told = []
    monkeypatch.setattr(probe, "measure", lambda dtype: probe.Best(7, library))
    monkeypatch.setattr(packed, "prefer_onednn", lambda: told.append(library))
    probe._prepare()
    assert told == [library] * (library == "onednn")


def test_measuring_gives_a_product_that_exists(monkeypatch):
    monkeypatch.setattr(probe, "_COUNTS", (1, 4))
    found = probe.measure(torch.float32)
    assert found.rows in (0, 1, probe._ALL)
    assert found.library in probe.LIBRARY


def test_windows_coarse_clock_of_threads_decides_nothing(monkeypatch):
    now = [0.0]

    def run(*given):
        best = given[-1]
        now[0] += 1 if best.rows else 2 if best.library == "transposed" else 3

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("llama4_lab.experts.numba.run", run)
    monkeypatch.setattr("time.thread_time", lambda: 0.0)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert probe.measure(torch.float32) == probe.Best(probe._ALL, "transposed")


def test_no_import_brings_the_compiler():
    code = "import sys, torch, llama4_lab; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"]


def test_the_environment_names_another_backend(monkeypatch):
    monkeypatch.setattr(probe, "CHOSEN", "padded")
    assert experts.choose_backend(torch.ones(1)) == "padded"
    monkeypatch.setattr(probe, "CHOSEN", "fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'; choose auto, loop, numba"):
        experts.moe(torch.ones(1, D), *layer())


def test_until_kernels_are_compiled_auto_is_the_loop(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(probe, "CHOSEN", "auto")
    monkeypatch.setattr(loading, "_PATIENCE", 0.01)
    monkeypatch.setattr(probe, "LOADING", loading.Loading("a slow one", done.wait))
    x = torch.ones(1, 4)
    assert experts.choose_backend(x) == "loop"
    done.set()
    probe.LOADING.wait()
    assert experts.choose_backend(x) == "numba"


def test_what_is_put_off_begins_later_and_nobody_waits_for_it(monkeypatch):
    begun, done = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        done.wait()

    late = loading.Loading("a late one", work)
    late.put_off(3600)
    assert not begun.is_set()  # nobody has asked for it
    monkeypatch.setattr(probe, "CHOSEN", "auto")
    monkeypatch.setattr(loading, "_PATIENCE", 3600)  # whoever waited would wait that long
    monkeypatch.setattr(probe, "LOADING", late)
    assert experts.choose_backend(torch.ones(1, 4)) == "loop"
    assert not begun.is_set()
    late.put_off(0.01)
    assert experts.choose_backend(torch.ones(1, 4)) == "loop"
    assert begun.wait(60)
    late.put_off(3600)  # too late
    assert experts.choose_backend(torch.ones(1, 4)) == "loop"
    done.set()
    late.wait()
    assert experts.choose_backend(torch.ones(1, 4)) == "numba"


def test_nobody_waits_for_what_has_to_be_compiled_or_fails(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(loading, "_PATIENCE", 3600)  # whoever waited would wait that long
    monkeypatch.setattr(loading.Loading, "_compile_elsewhere", lambda self: done.wait())
    slow = loading.Loading("a slow one", lambda: None, lambda: False)
    assert not slow.is_done()
    done.set()
    slow.wait()
    assert slow.is_done()
    assert loading.Loading("one that is kept", lambda: None, lambda: True).is_done()
    assert not loading.Loading("one that fails", lambda: 1 // 0).is_done()


def test_another_process_compiles_what_is_not_on_disk(monkeypatch, tmp_path):
    (tmp_path / "slow_part.py").write_text(
        "import os, pathlib\n"
        "from llama4_lab.loading import Loading\n"
        "kept = pathlib.Path(__file__).with_name('kept')\n"
        "def work():\n"
        "    with kept.open('a') as file: print(os.getpid(), file=file)\n"
        "LOADING = Loading('a part', work, kept.exists)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    part = importlib.import_module("slow_part")
    part.LOADING.wait()
    other, own = part.kept.read_text().split()
    assert (int(own), other != own) == (os.getpid(), True)
    part.kept.write_text("")
    loading.Loading("a part", part.work, part.kept.exists).wait()
    assert part.kept.read_text().split() == [own]  # nobody else has to


@pytest.mark.slow
def test_compiled_kernels_are_kept_until_one_that_they_call_changes(tmp_path):
    call = "import caller; from llama4_lab import compiled; "
    call += "print(compiled.is_kept(caller.twice), caller.twice(3))"
    head = "from llama4_lab.compiled import compiled\n"

    def write(name, text, age):
        (tmp_path / name).write_text(head + text)
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))

    def said():
        own = {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}", "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
        command = [sys.executable, "-c", call]
        return subprocess.check_output(command, env=os.environ | own, text=True).split()

    write("callee.py", "@compiled\ndef once(x):\n    return x + 1\n", age=100)
    twice = "from callee import once\n@compiled\ndef twice(x):\n    return once(once(x))\n"
    write("caller.py", twice, age=100)
    assert said() == ["False", "5"]
    assert said() == ["True", "5"]
    write("callee.py", "@compiled\ndef once(x):\n    return x + 10\n", age=0)
    assert said() == ["False", "23"]
    assert said() == ["True", "23"]
    write("callee.py", "@compiled\ndef once(x):\n    return x + 10\n", age=-1000)  # a wrong clock
    assert said()[1] == "23"


def test_imports_leave_the_garbage_collector_as_it_was():
    code = (
        "import gc; {0}; before = gc.get_freeze_count(); {1}; import llama4_lab;"
        "print(gc.isenabled(), gc.get_freeze_count() > before)"
    )
    for first, second, said in [
        ("pass", "pass", "True True"),
        ("pass", "gc.disable()", "False True"),
        ("import torch", "pass", "True False"),  # tensors may be there, which are to go one day
    ]:
        command = [sys.executable, "-c", code.format(first, second)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == said


def test_kernels_that_cannot_be_compiled_leave_the_loop(monkeypatch):
    def fail() -> None:
        raise OSError("no space left")

    monkeypatch.setattr(probe, "CHOSEN", "auto")
    monkeypatch.setattr(probe, "LOADING", loading.Loading("compiling", fail))
    assert experts.choose_backend(torch.ones(1, 4)) == "loop"
    with pytest.raises(RuntimeError, match="compiling failed: no space left"):
        probe.LOADING.wait()
