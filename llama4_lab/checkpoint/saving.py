"""Write a model as a Hugging Face folder, which transformers opens too."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llama4_lab.checkpoint.files import first_of, read_json, spelled
from llama4_lab.checkpoint.huggingface import (
    CONFIG,
    GENERATION,
    INDEX,
    SINGLE,
    ending_as_said,
    is_transposed,
    their_name,
)
from llama4_lab.checkpoint.quantised import Quantisation, declare, quantisation_of
from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.prompt import Tokenizer

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

UNFINISHED = ".unfinished-"
_BEFORE = ".before"  # ends the name of a file that was moved out of the way
_LEFT_BY_SAVE = re.compile(re.escape(UNFINISHED) + "[a-z0-9_]{8}")  # as tempfile names folders
_COMPANIONS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", GENERATION),
    *("preprocessor_config.json", "processor_config.json"),
)


def save(model: Llama4, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write config and weights, and copies of the tokenizer and what lies beside it.

    Weights keep their dtype; packed ones stay packed, and only `load` opens such a folder.
    Everything is written under another name first, so that a full disk or an interruption leaves
    what was there, or no config.json if it falls between the renames at the end; an earlier
    checkpoint in the folder is replaced, with its tokenizer, what a killed `save` left there is
    removed, and other files of the folder stay.

    Args:
        max_shard_bytes: more than that goes into several files with an index. Experts are
            transposed for the file, which needs as much memory again as one file has of them.

    Raises:
        FileExistsError: the folder holds something else than a Llama 4 checkpoint.
        ValueError: some weights are packed and others are not, experts are in a file, the model is
            spread over ranks, or its parts are no longer those that its config describes.
        OSError: the files could not be written; those of an earlier checkpoint are intact.
    """
    if model.expert_memory is not None:
        raise ValueError(
            "the experts of this model stay in the folder that it was loaded from: copy that, or "
            "load it without experts='mmap'"
        )
    if model.ranks.size > 1:
        raise ValueError(
            f"this rank holds a part of the model, one of {model.ranks.size}: save it from the "
            "process of a model that was loaded whole"
        )
    check_shard_bytes(max_shard_bytes)
    folder = Path(folder).expanduser()
    check_vacant(folder)
    quantisation = quantisation_of(model)
    layout = quantisation.to_dict() if quantisation else None
    state = _state(model)
    _check_state(state, model.config, quantisation)
    shards = in_shards({name: tensor.nbytes for name, tensor in state.items()}, max_shard_bytes)
    multimodal = model.config.vision_config is not None
    with _replaced(folder) as new:
        weight_map = {}
        for file, shard in shards.items():
            content = {
                their_name(name, multimodal): _as_stored(name, state[name]) for name in shard
            }
            save_file(_apart(content), new / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(content, file)
        size = sum(parameter.nbytes for parameter in state.values())
        write_listings(new, size, weight_map, config_as_json(model.config, model.dtype, layout))
        for file in shards:  # safetensors writes them for the owner alone
            shutil.copymode(new / CONFIG, new / file)
        copy_companions(model.tokenizer, model.config, new)


def check_vacant(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give the name of a folder")
    held = sorted(f.name for f in folder.iterdir() if not f.name.startswith(UNFINISHED))
    if held and not _is_checkpoint(folder):
        raise FileExistsError(
            f"{folder} holds {held[0]} and no Llama 4 checkpoint of Hugging Face's format: give a "
            "new or empty folder"
        )


def check_shard_bytes(given: object) -> None:
    if not isinstance(given, int | float):
        raise ValueError(f"max_shard_bytes={given!r}: give a number of bytes, as 5_000_000_000")


def _state(model: Llama4) -> dict[str, Tensor]:
    """Return all tensors by name, also those that stand in two places, up to a tied read-out."""
    state = dict(model.named_parameters(remove_duplicate=False))
    state |= dict(model.named_buffers(remove_duplicate=False))
    if model.config.tie_word_embeddings and model.lm_head.weight is model.embed_tokens.weight:
        del state["lm_head.weight"]
    return state


def _check_state(
    state: Mapping[str, Tensor], config: Llama4Config, quantisation: Quantisation | None
) -> None:
    """Refuse what `load` would refuse: tensors that are not those that the config asks for."""
    with torch.device("meta"):
        model = Llama4(config)
    if quantisation is not None:
        declare(model, quantisation)
    asked = dict(model.named_parameters()) | dict(model.named_buffers())
    change = "change model.config to what the model has become"
    if missing := [name for name in asked if name not in state]:
        raise ValueError(
            f"the model lacks {first_of(missing)}, which its config asks for: {change}"
        )
    if foreign := [name for name in state if name not in asked]:
        raise ValueError(
            f"the model holds {first_of(foreign)}, for which its config has no place: {change}"
        )
    for name, tensor in asked.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {list(state[name].shape)} where the model's config asks for "
                f"{list(tensor.shape)}: {change}"
            )


def _is_checkpoint(folder: Path) -> bool:
    """Whether there is a config of Llama 4, or one that waits to be moved there."""
    for config in (folder / CONFIG, *folder.glob(f"{UNFINISHED}*/{CONFIG}")):
        with suppress(OSError, ValueError):
            if read_json(config).get("model_type") in ("llama4", "llama4_text"):
                return True
    return False


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Give a new folder to write into; its files replace those of the checkpoint at the end."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
    with locked(new):
        try:
            yield new
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # others have written into it meanwhile
                    folder.rmdir()
            if not isinstance(error, OSError | SafetensorError):
                raise
            intact = "" if is_new else "; the files that were there are intact"
            raise OSError(f"{folder} could not be written ({error}){intact}") from error
        try:
            publish(new, folder)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Mark a folder as one that is written to, until the block or the process ends.

    Gives False where another has marked it, and None where the system cannot tell.
    """
    if fcntl is None:
        yield None
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_mine = True
        except BlockingIOError:
            is_mine = False
        except OSError:  # some network drives have no such marks
            is_mine = None
        yield is_mine
    finally:
        os.close(held)


def publish(new: Path, folder: Path, moved: Iterable[str] = ()) -> None:
    """Move files to where they belong, and remove those that they replace.

    There is no config.json meanwhile: whoever is killed leaves no mixture of two checkpoints. What
    killed saves into the folder have left goes too; an unfinished conversion stays. Earlier files
    are moved out of the way first, for Windows replaces and removes none that a model has mapped.

    Args:
        moved: files that may be there already, and belong to the new ones.

    Raises:
        OSError: a file could not be moved; all are where they were.
    """
    written = {file.name for file in new.iterdir()}
    shards = {file.name for file in folder.glob("model-*-of-*.safetensors")}
    old = {SINGLE, INDEX, *_COMPANIONS, *shards} - set(moved) | written
    old = [name for name in old - {CONFIG} if (folder / name).exists()]
    moves = [(folder / name, new / f"{name}{_BEFORE}") for name in old]
    moves += [(new / name, folder / name) for name in [*(written - {CONFIG}), CONFIG]]
    config, done = folder / CONFIG, []
    before = config.read_bytes() if config.exists() else None
    try:
        config.unlink(missing_ok=True)
        for here, there in moves:
            here.replace(there)
            done.append((here, there))
    except OSError as error:
        for here, there in reversed(done):
            there.replace(here)
        if before is not None:
            config.write_bytes(before)
        raise OSError(
            f"{folder} could not be replaced ({error}); the files that were there are intact: "
            "close what has them open, or give another folder"
        ) from error
    shutil.rmtree(new, ignore_errors=True)
    for left in folder.glob(f"{UNFINISHED}*"):
        if _LEFT_BY_SAVE.fullmatch(left.name) and not left.is_symlink():
            with suppress(OSError), locked(left) as is_dead:
                if is_dead or {file.suffix for file in left.iterdir()} == {_BEFORE}:
                    shutil.rmtree(left, ignore_errors=True)


def in_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Name files and what they hold, in the given order: as many as fit, but at least one."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": s for i, s in enumerate(shards, 1)}


def _as_stored(name: str, parameter: Tensor) -> Tensor:
    tensor = parameter.detach().cpu()
    return (tensor.mT if is_transposed(name) else tensor).contiguous()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor memory of its own: a file takes none that two names share."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def config_as_json(
    config: Llama4Config, dtype: torch.dtype, layout: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what config.json says; `layout` is our own, None Hugging Face's."""
    raw = config.to_dict()
    for part in (raw, raw.get("text_config", raw)):
        part["dtype"] = spelled(dtype)
    return raw | ({"quantization_config": layout} if layout else {})


def write_listings(
    folder: Path, size: int, weight_map: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """Write config.json, and the index where there are several files; size counts all bytes."""
    if len(set(weight_map.values())) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    _write_json(folder / CONFIG, config)


def copy_companions(tokenizer: Tokenizer | None, config: Llama4Config, folder: Path) -> None:
    """Copy the tokenizer's file and what lies beside it; a text ends as the config says."""
    if tokenizer is None:
        return
    if tokenizer.text is not None:
        (folder / "tokenizer.json").write_text(tokenizer.text, encoding="utf-8")
        return
    file = tokenizer.file
    beside = [file.with_name(name) for name in _COMPANIONS if name != file.name]
    for companion in (file, *(path for path in beside if path.is_file())):
        shutil.copyfile(companion, folder / companion.name)
    if ending_as_said(config, folder) != config:
        said = read_json(folder / GENERATION) | {"eos_token_id": config.eos_token_id}
        _write_json(folder / GENERATION, said)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
