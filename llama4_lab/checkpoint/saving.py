"""Write a model as a Hugging Face folder, which transformers opens too."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llama4_lab.checkpoint.files import read_json
from llama4_lab.checkpoint.huggingface import CONFIG, INDEX, SINGLE, is_transposed, their_name
from llama4_lab.model import Llama4

_UNFINISHED = ".unfinished-"
_COMPANIONS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
)


def save(model: Llama4, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write config and weights, and copies of the tokenizer and what lies beside it.

    Weights keep their dtype. Everything is written under another name first, so that a full disk
    or an interruption leaves what was there; an earlier checkpoint in the folder is replaced, other
    files of the folder stay.

    Args:
        max_shard_bytes: more than that goes into several files with an index. Experts are
            transposed for the file, which needs as much memory again as one file has of them.

    Raises:
        FileExistsError: the folder holds something else than a Llama 4 checkpoint.
        OSError: the files could not be written; those of an earlier checkpoint are intact.
    """
    folder = Path(folder).expanduser()
    _check_vacant(folder)
    state = dict(model.named_parameters())
    shards = _shards(state, max_shard_bytes)
    multimodal = model.config.vision_config is not None
    with _replaced(folder) as new:
        weight_map = {}
        for i, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            content = {
                their_name(name, multimodal): _as_stored(name, state[name]) for name in shard
            }
            save_file(content, new / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(content, file)
        if len(shards) > 1:
            size = sum(parameter.nbytes for parameter in state.values())
            _write_json(new / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _write_json(new / CONFIG, _config(model))
        for companion in _companions(model):
            shutil.copyfile(companion, new / companion.name)


def _check_vacant(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give the name of a folder")
    held = sorted(f.name for f in folder.iterdir() if not f.name.startswith(_UNFINISHED))
    if held and not _is_checkpoint(folder):
        raise FileExistsError(
            f"{folder} holds {held[0]} and no Llama 4 checkpoint of Hugging Face's format: give a "
            "new or empty folder"
        )


def _is_checkpoint(folder: Path) -> bool:
    try:
        return read_json(folder / CONFIG).get("model_type") in ("llama4", "llama4_text")
    except (OSError, ValueError):
        return False


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Give a new folder to write into; its files replace those of the checkpoint at the end."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        yield new
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder if is_new else new)
        intact = "" if is_new else "; the files that were there are intact"
        raise OSError(f"{folder} could not be written ({error}){intact}") from error
    except BaseException:
        shutil.rmtree(folder if is_new else new)
        raise
    written = {file.name for file in new.iterdir()}
    for name in written:
        (new / name).replace(folder / name)
    new.rmdir()
    for old in (SINGLE, INDEX, *(file.name for file in folder.glob("model-*-of-*.safetensors"))):
        if old not in written:
            (folder / old).unlink(missing_ok=True)


def _shards(state: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Group the names in their order, as many into one shard as fit, but at least one."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in state.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


def _as_stored(name: str, parameter: Tensor) -> Tensor:
    tensor = parameter.detach().cpu()
    return (tensor.mT if is_transposed(name) else tensor).contiguous()


def _config(model: Llama4) -> dict[str, Any]:
    raw = model.config.to_dict()
    for part in (raw, raw.get("text_config", raw)):
        part["dtype"] = str(model.dtype).removeprefix("torch.")
    return raw


def _companions(model: Llama4) -> list[Path]:
    """List the tokenizer's file and what lies beside it for other programs."""
    if model.tokenizer is None:
        return []
    file = model.tokenizer.file
    beside = [file.with_name(name) for name in _COMPANIONS if name != file.name]
    return [file, *(path for path in beside if path.is_file())]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
