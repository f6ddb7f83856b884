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
