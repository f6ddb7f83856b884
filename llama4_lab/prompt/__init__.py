"""What a model reads: text, chat messages and pictures as a `Prompt`.

Read `llama4_lab.prompt.tokenizer`, `.chat` and `.images` for the three formats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.prompt.chat import PICTURE, Encoded, encode_chat
from llama4_lab.prompt.images import (
    Layout,
    Picture,
    Tiling,
    cut_tiles,
    image_tokens,
    open_picture,
    place,
)
from llama4_lab.prompt.tokenizer import Tokenizer

__all__ = ["Layout", "Prompt", "Spans", "Tiling", "Tokenizer", "build_prompt", "tokens_of"]


@dataclass(frozen=True, eq=False)
class Spans:
    """What each token belongs to, -1 for nothing; on the CPU.

    `tile` counts along `Prompt.pixel_values` and `patch` row by row within its tile, so that
    ``divmod(patch, tiling.grid)`` is its row and column.
    """

    message: Int[Tensor, "b t"]
    image: Int[Tensor, "b t"]
    tile: Int[Tensor, "b t"]
    patch: Int[Tensor, "b t"]
    roles: list[str]  # of each message; an open header at the end counts as one
    layouts: list[Layout]  # of each image
    tiling: Tiling | None  # None for a model that reads only text


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids with the pictures among them; ``model(**prompt)`` reads it.

    Rows shorter than the longest are padded on the left, where `attention_mask` is 0.
    """

    input_ids: Int[Tensor, "b t"]
    pixel_values: Float[Tensor, "tiles c height width"] | None
    attention_mask: Int[Tensor, "b t"]
    texts: list[list[str]]  # the tokens of each row, for display
    spans: Spans

    def __repr__(self) -> str:
        rows, count = self.input_ids.shape
        text = "".join(self.texts[0])
        begins = text if len(text) <= 60 else f"{text[:60]} …"
        return f"Prompt({rows} × {count} tokens, {len(self.spans.layouts)} pictures: {begins!r})"

    def keys(self) -> tuple[str, ...]:
        """Name the model's arguments."""
        return ("input_ids", "pixel_values", "attention_mask")

    def __getitem__(self, key: str) -> Tensor | None:
        if key not in self.keys():
            raise KeyError(f"a prompt has {', '.join(self.keys())}, not {key!r}")
        return getattr(self, key)

    @property
    def tokens(self) -> list[str]:
        """The tokens of a prompt of one row, for display."""
        if len(self.texts) != 1:
            raise ValueError(f"this prompt has {len(self.texts)} rows: take one from prompt.texts")
        return self.texts[0]

    def followed_by(self, ids: Sequence[int], texts: Sequence[str]) -> "Prompt":
        """Return this prompt of one row with more tokens, which belong to its last message."""
        count, spans = len(ids), self.spans

        def longer(labels: Tensor, more: int | Tensor) -> Tensor:
            return torch.cat(
                [labels, torch.as_tensor(more, device=labels.device).expand(1, count)], 1
            )

        return replace(
            self,
            input_ids=longer(self.input_ids, torch.tensor(ids, dtype=torch.long)),
            attention_mask=longer(self.attention_mask, 1),
            texts=[[*self.tokens, *texts]],
            spans=replace(
                spans,
                message=longer(spans.message, spans.message[:, -1:]),
                image=longer(spans.image, -1),
                tile=longer(spans.tile, -1),
                patch=longer(spans.patch, -1),
            ),
        )

    def to(self, device: str | torch.device) -> "Prompt":
        """Move the model's arguments to a device."""
        tensors = {
            key: tensor.to(device) for key in self.keys() if (tensor := self[key]) is not None
        }
        return replace(self, **tensors)


def tokens_of(prompt: Prompt) -> list[str]:
    """Return the tokens of a prompt of one row, for display.

    Raises:
        TypeError: a text, ids or messages in its place.
        ValueError: a prompt of several rows.
    """
    if not isinstance(prompt, Prompt):
        raise TypeError(f"{prompt!r:.60} is no Prompt: give what model.prompt makes of it")
    return prompt.tokens


def build_prompt(
    tokenizer: Tokenizer,
    text_or_messages: str | Sequence[str] | Sequence[Mapping[str, Any]],
    images: Picture | Sequence[Picture] = (),
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    shuffle_ratio: float | None = None,
    num_channels: int = 3,
    max_tiles: int = 16,
    add_bos: bool = True,
    open_assistant: bool | None = None,
) -> Prompt:
    """Build what a model reads from a text, a list of texts (a batch) or a list of chat messages.

    Rows of a batch are padded on the left, which long ones can tell (see `Llama4.forward`).
    Pictures come before a text; in messages they take the places of the image parts, in order.
    Special tokens in texts and messages are plain text. The sizes are those of the model's vision
    encoder, None without one; `open_assistant` is that of `llama4_lab.prompt.chat.encode_chat`.

    Raises:
        TypeError, ValueError: what cannot be read, and what can.
    """
    if image_size is None or patch_size is None or shuffle_ratio is None:
        tiling = None
    else:
        tiling = Tiling(image_size, patch_size, shuffle_ratio, num_channels, max_tiles)
    layouts, pixel_values = _look_at(
        [images] if isinstance(images, Picture | Tensor) else images, tiling
    )
    encoded = _encode(tokenizer, text_or_messages, len(layouts), add_bos, open_assistant)
    rows = [_label(tokenizer, row, layouts, tiling) for row in encoded]

    for i, row in enumerate(rows):
        if not row:
            what = "the prompt" if len(rows) == 1 else f"text {i} of the batch"
            raise ValueError(f"{what} has no tokens: give a text, or leave add_bos=True")
    length = max(map(len, rows))
    pad = (tokenizer.pad_id, -1, -1, -1, -1)
    table = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device="cpu")
    input_ids, message, image, tile, patch = table.movedim(-1, 0).contiguous()
    lengths = torch.tensor([[len(row)] for row in rows], device="cpu")
    return Prompt(
        input_ids=input_ids,
        pixel_values=pixel_values,
        attention_mask=(torch.arange(length, device="cpu") >= length - lengths).long(),
        texts=[[tokenizer.token_text(idx) for idx in row] for row in input_ids.tolist()],
        spans=Spans(message, image, tile, patch, encoded[0].roles, layouts, tiling),
    )


def _look_at(
    pictures: Sequence[Picture], tiling: Tiling | None
) -> tuple[list[Layout], Float[Tensor, "tiles c height width"] | None]:
    """Lay out the pictures and cut them into the tiles of all."""
    if not pictures:
        return [], None
    if tiling is None:
        raise ValueError(
            f"{len(pictures)} image(s) given, but this model reads only text: "
            "give none, or load a model with a vision encoder"
        )
    opened = [open_picture(picture, tiling.num_channels) for picture in pictures]
    layouts = [place(picture.height, picture.width, tiling) for picture in opened]
    pairs = zip(opened, layouts, strict=True)
    return layouts, torch.cat([cut_tiles(picture, layout, tiling) for picture, layout in pairs])


def _encode(
    tokenizer: Tokenizer,
    text_or_messages: Any,
    num_images: int,
    add_bos: bool,
    open_assistant: bool | None,
) -> list[Encoded]:
    """Encode each row of the batch and check that it has a place for each picture."""
    start = [tokenizer.bos_id] if add_bos else []
    if isinstance(text_or_messages, str):
        ids = [*start, *[PICTURE] * num_images, *tokenizer.encode(text_or_messages)]
        return [Encoded(ids, [-1] * len(ids), [])]
    is_bytes = isinstance(text_or_messages, bytes)
    if is_bytes or not isinstance(text_or_messages, Sequence) or not text_or_messages:
        raise TypeError(
            f"{text_or_messages!r:.80} is no prompt: give a text, a list of texts, "
            'or a list of messages {"role": ..., "content": ...}'
        )
    if all(isinstance(text, str) for text in text_or_messages):
        if num_images:
            raise ValueError("a batch of texts takes no images: build one prompt for each text")
        batch = [[*start, *tokenizer.encode(text)] for text in text_or_messages]
        return [Encoded(ids, [-1] * len(ids), []) for ids in batch]
    chat = encode_chat(tokenizer, text_or_messages, add_bos=add_bos, open_assistant=open_assistant)
    if (num_parts := chat.ids.count(PICTURE)) != num_images:
        raise ValueError(
            f"the messages have {num_parts} image part(s), but images has {num_images}: give each "
            'picture there, and write one {"type": "image"} for it'
        )
    return [chat]


def _label(
    tokenizer: Tokenizer, row: Encoded, layouts: list[Layout], tiling: Tiling | None
) -> list[tuple[int, int, int, int, int]]:
    """Write out a row's pictures: for each token its id, message, image, tile and patch."""
    labels = []
    image, first_tile = 0, 0
    for idx, message in zip(row.ids, row.message, strict=True):
        if idx != PICTURE:
            labels.append((idx, message, -1, -1, -1))
            continue
        assert tiling is not None
        for name, tile, patch in image_tokens(layouts[image], tiling):
            tile += first_tile if tile >= 0 else 0
            labels.append((tokenizer.id_of(name), message, image, tile, patch))
        first_tile += layouts[image].num_tiles
        image += 1
    return labels
