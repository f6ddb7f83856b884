"""The trained models inside the package, by name."""

import difflib
from os import PathLike
from pathlib import Path

MODELS = Path(__file__).parents[1] / "models"
GGUF = ".gguf"


def names() -> list[str]:
    """List the models that `llama4_lab.load` knows by name."""
    return sorted(config.parent.name for config in MODELS.glob("*/config.json"))


def find(name_or_folder: str | Path) -> Path:
    """Return a shipped model's folder, or else the folder itself; ``./mini`` is never shipped.

    A file of GGUF stands for itself.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: there is no such folder or model.
        TypeError: neither a name nor a folder.
    """
    known = names()
    if not isinstance(name_or_folder, str | PathLike):
        raise TypeError(f"{name_or_folder!r:.80} is no model: give a name or a checkpoint folder")
    if name_or_folder in known:
        return MODELS / name_or_folder
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir() or (folder.is_file() and folder.suffix == GGUF):
        return folder.absolute()  # what stays in files is there wherever the process goes
    if folder.exists():
        raise NotADirectoryError(
            f"{folder} is a file: give the folder of the checkpoint, or a file of GGUF"
        )
    shipped = ", ".join(known) or "none"
    if isinstance(name_or_folder, Path) or len(folder.parts) > 1:
        raise FileNotFoundError(
            f"{folder} does not exist: give a checkpoint folder of this machine (nothing is "
            f"downloaded), or a shipped model's name ({shipped})"
        )
    close = difflib.get_close_matches(name_or_folder, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"unknown model {name_or_folder!r}: {hint}give a shipped model's name ({shipped}) or a "
        "checkpoint folder"
    )
