"""Values on disk: one memory-mapped safetensors file for each."""

import glob
import time
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_ENDING, _BEFORE = ".safetensors", ".before"


def claim(folder: str | Path) -> Path:
    """Make a folder for values, or take an empty one.

    Raises:
        FileExistsError: it is a file, or holds something.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give the name of a folder to spill to")
    folder.mkdir(parents=True, exist_ok=True)
    if held := sorted(file.name for file in folder.iterdir()):
        what = "an earlier spill" if any(name.endswith(_ENDING) for name in held) else held[0]
        raise FileExistsError(f"{folder} holds {what}: give a new or empty folder to spill to")
    return folder


def put(folder: Path, name: str, value: Tensor) -> Tensor:
    """Write a value to its file and return it memory-mapped: read when it is used, not before.

    It replaces an earlier value of the name, whose tensor stays readable. Changing the tensor in
    place does not change the file.

    Raises:
        OSError: it could not be written; the earlier file is intact.
    """
    file = folder / f"{name}{_ENDING}"
    unfinished = file.with_suffix(".unfinished")
    try:
        save_file({name: value.detach().cpu().contiguous()}, unfinished)
        try:
            unfinished.replace(file)
        except PermissionError:  # Windows replaces no mapped file, but renames it
            for earlier in folder.glob(f"{glob.escape(name)}.*{_BEFORE}"):
                with suppress(OSError):  # it is mapped still
                    earlier.unlink()
            file.replace(file.with_suffix(f".{time.monotonic_ns()}{_BEFORE}"))
            unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{name!r} ({value.nbytes:,} bytes) could not be spilled to {folder} ({error}): make "
            "room, or trace fewer names or positions"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return _mapped(file, name)


def load_trace(folder: str | Path) -> dict[str, Tensor]:
    """Return what ``trace(spill=folder)`` wrote, or ``llama4-lab trace --out``, memory-mapped.

    Raises:
        FileNotFoundError: there is no such folder, or no value in it.
        ValueError: a file that is broken.
    """
    folder = Path(folder).expanduser()
    if not (files := sorted(folder.glob(f"*{_ENDING}"))):
        raise FileNotFoundError(f"{folder} holds no values: give a folder that a trace spilled to")
    values = {}
    for file in files:
        try:
            values[file.stem] = _mapped(file, file.stem)
        except SafetensorError as error:
            raise ValueError(f"{file} is broken ({error}): trace again") from error
    return values


def _mapped(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as content:
        return content.get_tensor(name)
