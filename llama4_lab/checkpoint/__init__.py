"""Files in and out: `load`, `save` and `convert`.

Read `llama4_lab.checkpoint.huggingface`, `.meta` and `.gguf` for the formats, `.parts` for what
other programs quantised, `.files` for the checks.
"""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llama4_lab.checkpoint.converting import Folder, convert_folder
from llama4_lab.checkpoint.files import DTYPES
from llama4_lab.checkpoint.gguf import GgufFile
from llama4_lab.checkpoint.huggingface import CONFIG, HuggingFaceFolder
from llama4_lab.checkpoint.mapping import leave_experts
from llama4_lab.checkpoint.meta import PARAMS, MetaFolder
from llama4_lab.checkpoint.quantised import Quantisation, declare, read_packed
from llama4_lab.checkpoint.saving import check_shard_bytes, save
from llama4_lab.checkpoint.shipped import GGUF, MODELS, find
from llama4_lab.model import Llama4
from llama4_lab.precision import device_of
from llama4_lab.prompt import Tokenizer, build_prompt
from llama4_lab.prompt.images import check_max_tiles

__all__ = ["convert", "load", "save"]


def load(
    name_or_folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    experts: str | None = None,
    memory_limit: int | None = None,
    text_only: bool = False,
    max_tiles: int = 16,
) -> Llama4:
    """Load a shipped model by name, or a checkpoint: a Hugging Face or Meta folder, a file of GGUF.

    Config, tokenizer, and the names, shapes and dtypes of all tensors are checked before memory is
    taken. Files are mapped, and a tensor is copied at most once, so that the peak is the weights
    and one layer. On the CPU, tensors that are stored as they are used stay mapped: they are read
    when they are first needed, and the files should not be written to while the model lives
    (`save` does not; it replaces them). Of a folder that `convert` wrote these are all.

    Args:
        dtype: None keeps the files' dtype, which is bfloat16 where GGUF has few bits, and means
            float32 for a shipped model: they are small, and most CPUs are faster and exacter in it
            than in the bfloat16 of their files.
        quantize: "int8", "int4" or "fp8" packs the weights of the text decoder's linear layers
            (attention, experts, MLPs, lm_head unless it is tied) while they are read, one matrix in
            memory at a time; `llama4_lab.packed` says how. Routers decide by small differences and
            norms are small, embeddings are looked up and not multiplied with, and the vision
            encoder has 1% of the weights: these stay. None takes the weights as the folder has
            them, in few bits if they were saved so; other programs' codes become plain.
        experts: "mmap" leaves the routed experts in the files, quantised or not. One is read when a
            token asks for it, once in a forward pass for all its tokens: a batch of prompts, or the
            variants that `Replay` runs together. The readable backend computes with them. Those
            that another program quantised stay as it wrote them whatever `quantize` says.
        memory_limit: bytes of such experts that stay in memory, those read last; None stands for
            those of two layers. ``model.expert_memory`` counts ``bytes_read`` and ``bytes_held``.
        text_only: leave the vision encoder out.
        max_tiles: of one picture, in prompts.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder, or a file that it needs is missing.
        ImportError: GGUF needs the package ``gguf``.
        TypeError: neither a name nor a folder.
        ValueError: unknown model or device, or a file that is broken, foreign or contradicts the
            config; a `quantize` that does not exist, or not the one of a quantised folder; a
            `max_tiles` that is no number of tiles.
    """
    check_max_tiles(max_tiles)
    _check_dtype(dtype)
    folder, device = find(name_or_folder), device_of(device)
    if dtype is None and folder.parent == MODELS:
        dtype = torch.float32
    source = _open(folder, text_only)
    tokenizer = _tokenizer(source, folder)
    with torch.device("meta"):
        model = Llama4(source.config)
    if source.quantisation is not None:
        _check_kind(folder, source.quantisation.kind, quantize)
        declare(model, source.quantisation)
    stored = dict(model.named_parameters()) | dict(model.named_buffers())
    source.check(stored)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if experts is not None or memory_limit is not None:
        _check_experts(source, folder, experts, quantize, memory_limit)
        assert not isinstance(source, MetaFolder)
        left = leave_experts(model, source, memory_limit, device, dtype)
        stored = {name: tensor for name, tensor in stored.items() if name not in left}
    state: dict[str, Tensor] = {}
    if quantize is not None and source.quantisation is None:
        chosen = Quantisation(quantize)
        packed = declare(model, chosen)
        state |= read_packed(source, shapes, packed, chosen, device)
        stored = {name: tensor for name, tensor in stored.items() if name not in packed}
    state |= source.read({name: shapes[name] for name in stored}, device, dtype)
    if source.config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if tokenizer is not None:
        model.tokenizer = tokenizer
        vision = source.config.vision_config
        tile = vision.tile if vision else {}
        model.build_prompt = partial(build_prompt, tokenizer, max_tiles=max_tiles, **tile)
    return model.eval()


def convert(
    name_or_folder: str | Path,
    target: str | Path,
    *,
    quantize: str | None = None,
    dtype: torch.dtype | None = None,
    text_only: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint of any size in our own layout, an expert in memory at a time.

    There all weights lie as the model holds them, so that `load` maps them and copies none;
    `llama4_lab.checkpoint.quantised` describes it. Only llama4_lab opens such a folder: `save`
    writes those that transformers opens. The target becomes a checkpoint when all is written, and
    replaces one that was made from the same source. After an interruption a second call goes on
    behind the last whole file. Of Meta's folders the largest matrix (the embeddings) is in memory
    at once.

    Args:
        quantize: packs weights as `load` does; None keeps them.
        dtype: of the weights that are not packed; None keeps the files' one.

    Raises:
        FileExistsError, FileNotFoundError, NotADirectoryError, OSError: there is no such source, or
            the target cannot be written or holds something else, be it a checkpoint, whole or
            unfinished, of another source.
        ValueError: as for `load`; a source that is packed already; or a target that is the source.
    """
    _check_dtype(dtype)
    check_shard_bytes(max_shard_bytes)
    folder, target = find(name_or_folder), Path(target).expanduser()
    if target.resolve() == folder.resolve():
        raise ValueError(f"{target} is what is converted: give another folder to write to")
    source = open_plain(folder, text_only)
    quantisation = None if quantize is None else Quantisation(quantize)
    tokenizer = _tokenizer(source, folder)
    convert_folder(source, tokenizer, target, quantisation, max_shard_bytes, dtype)


def open_plain(folder: Path, text_only: bool = False) -> Folder:
    """Open a folder whose weights can be written anew.

    Raises:
        ValueError: they are quantised, or the folder is no checkpoint.
    """
    source = _open(folder, text_only)
    if source.quantisation is not None:
        raise ValueError(
            f"{folder} is quantised already, to {source.quantisation.kind}: convert the checkpoint "
            "that it was made from"
        )
    return source


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES.values():
        allowed = ", ".join(map(str, DTYPES.values()))
        raise ValueError(f"dtype {dtype} is not one for weights: give {allowed}, or None")


def _open(folder: Path, text_only: bool) -> Folder:
    if folder.suffix == GGUF and folder.is_file():
        return GgufFile.open(folder, text_only)
    if (folder / CONFIG).is_file():
        return HuggingFaceFolder.open(folder, text_only)
    if (folder / PARAMS).is_file():
        return MetaFolder.open(folder, text_only)
    if found := sorted(folder.glob(f"*{GGUF}")):
        raise FileNotFoundError(f"{folder} is a folder of GGUF files: give one, {found[0]}")
    raise FileNotFoundError(
        f"{folder} is not a checkpoint: it needs {CONFIG} (Hugging Face) or {PARAMS} (Meta)"
    )


def _check_kind(folder: Path, stored: str, asked: str | None) -> None:
    if asked not in (None, stored):
        raise ValueError(
            f"{folder} holds {stored} weights, which cannot become {asked!r}: leave quantize out, "
            "or quantise the checkpoint that they were made from"
        )


def _check_experts(
    source: Folder,
    folder: Path,
    experts: str | None,
    quantize: str | None,
    memory_limit: object,
) -> None:
    if experts != "mmap":
        raise ValueError(
            f"experts={experts!r}: give 'mmap' to leave the routed experts in their files, which "
            "memory_limit is for, or None to load them"
        )
    if memory_limit is not None and not (isinstance(memory_limit, int) and memory_limit >= 0):
        raise ValueError(f"memory_limit={memory_limit!r}: give bytes, a whole number from 0 up")
    command = f"llama4-lab convert {shlex.quote(str(folder))} TARGET"
    if quantize is not None and source.quantisation is None and not source.is_coded:
        raise ValueError(
            f"{folder} is not quantised, and its experts cannot be both packed and left there: "
            f"run `{command} --quantize {quantize}`, and load TARGET"
        )
    if isinstance(source, MetaFolder):
        raise ValueError(
            f"{folder} is in Meta's format, whose files hold no expert in one piece: run "
            f"`{command}`, and load TARGET"
        )


def _tokenizer(source: Folder, folder: Path) -> Tokenizer | None:
    """Read the checkpoint's tokenizer, if it has one, and check that its ids are the model's."""
    try:
        is_gguf = isinstance(source, GgufFile)
        tokenizer = source.tokenizer if is_gguf else Tokenizer.from_folder(folder)
    except FileNotFoundError:
        return None
    if tokenizer is None:
        return None
    config = source.config
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{tokenizer.file} has {tokenizer.vocab_size} tokens, but the model's vocab_size is "
            f"{config.vocab_size}: use the tokenizer that came with the checkpoint"
        )
    if config.vision_config is not None and tokenizer.patch_id != config.image_token_index:
        raise ValueError(
            f"{tokenizer.file} has <|patch|> at {tokenizer.patch_id}, but the model's "
            f"image_token_index is {config.image_token_index}: use the tokenizer that came with "
            "the checkpoint"
        )
    return replace(tokenizer, unused=range(tokenizer.vocab_size, config.vocab_size))
