"""Files in and out: `load` and `save`.

Read `llama4_lab.checkpoint.huggingface` and `.meta` for the formats, `.files` for the checks.
"""

from functools import partial
from pathlib import Path

import torch

from llama4_lab.checkpoint.files import DTYPES
from llama4_lab.checkpoint.huggingface import CONFIG, HuggingFaceFolder
from llama4_lab.checkpoint.meta import PARAMS, MetaFolder
from llama4_lab.checkpoint.saving import save
from llama4_lab.checkpoint.shipped import MODELS, find
from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.prompt import Tokenizer, build_prompt

__all__ = ["load", "save"]


def load(
    name_or_folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    text_only: bool = False,
    max_tiles: int = 16,
) -> Llama4:
    """Load a shipped model by name, or a checkpoint from a Hugging Face or Meta folder.

    Config, tokenizer, and the names, shapes and dtypes of all tensors are checked before memory is
    taken. Files are mapped, and a tensor is copied at most once, so that the peak is the weights
    and one layer. On the CPU, tensors that are stored as they are used stay mapped: they are read
    when they are first needed, and the files should not be written to while the model lives
    (`save` does not; it replaces them).

    Args:
        dtype: None keeps the files' dtype, and means float32 for a shipped model: they are small,
            and most CPUs are faster and exacter in it than in the bfloat16 of their files.
        text_only: leave the vision encoder out.
        max_tiles: of one picture, in prompts.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder, or a file that it needs is missing.
        ValueError: unknown model, or a file that is broken, foreign or contradicts the config.
    """
    if dtype is not None and dtype not in DTYPES.values():
        allowed = ", ".join(map(str, DTYPES.values()))
        raise ValueError(f"dtype {dtype} is not one for weights: give {allowed}, or None")
    folder, device = find(name_or_folder), torch.device(device)
    if dtype is None and folder.parent == MODELS:
        dtype = torch.float32
    if (folder / CONFIG).is_file():
        source = HuggingFaceFolder.open(folder, text_only)
    elif (folder / PARAMS).is_file():
        source = MetaFolder.open(folder, text_only)
    else:
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: it needs {CONFIG} (Hugging Face) or {PARAMS} (Meta)"
        )
    tokenizer = _tokenizer(folder, source.config)
    with torch.device("meta"):
        model = Llama4(source.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    source.check(shapes)

    state = dict(source.read(shapes, device, dtype))
    if source.config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if tokenizer is not None:
        model.tokenizer = tokenizer
        model.build_prompt = partial(
            build_prompt, tokenizer, max_tiles=max_tiles, **_tile_sizes(source.config)
        )
    return model.eval()


def _tokenizer(folder: Path, config: Llama4Config) -> Tokenizer | None:
    """Read the folder's tokenizer, if it has one, and check that its ids are the model's."""
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except FileNotFoundError:
        return None
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
    return tokenizer


def _tile_sizes(config: Llama4Config) -> dict[str, float]:
    vision = config.vision_config
    if vision is None:
        return {}
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "shuffle_ratio": vision.pixel_shuffle_ratio,
        "num_channels": vision.num_channels,
    }
