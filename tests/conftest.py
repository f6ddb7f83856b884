"""One thread, fixed seeds and deterministic algorithms for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch and numba are imported
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
# What "auto" becomes on the CPU, without timing anything first; tests of other backends name them.
os.environ.setdefault("LLAMA4_LAB_BACKEND", "numba")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def mapped_files_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Windows' files: one that is mapped into memory can be renamed, and nothing else."""
    if sys.platform != "linux":
        return  # Windows has them, and elsewhere nobody tells what is mapped
    replace, unlink = os.replace, os.unlink

    def check(path: Any, dir_fd: int | None = None) -> None:
        if os.path.lexists(path) or dir_fd is not None:
            inode = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino
            with open("/proc/self/maps", encoding="utf-8") as maps:
                if any(line.split()[4] == str(inode) for line in maps):
                    raise PermissionError(13, "Access is denied", str(path))

    def replacing(source: Any, target: Any, **options: Any) -> None:
        check(target)
        replace(source, target, **options)

    def unlinking(path: Any, *, dir_fd: int | None = None) -> None:
        check(path, dir_fd)
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "unlink", unlinking)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from small_tokenizer import small_tokenizer  # not before jaxtyping checks what is imported

    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    parity = sys.modules.get("parity")
    if parity and parity.LARGEST:
        name = max(parity.LARGEST, key=parity.LARGEST.__getitem__)
        terminalreporter.write_line(
            f"parity: {len(parity.LARGEST)} configurations, largest difference to transformers "
            f"{parity.LARGEST[name]:.1e} ({name})"
        )
