"""Rows of training data: what the model reads, what it should say, and how much each word counts.

Read `llama4_lab.train.lessons` next.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.prompt import Prompt, Tokenizer
from llama4_lab.prompt.chat import encode_chat


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch: position i reads `inputs[i]` and should predict `targets[i]`.

    The loss of a position counts `weights` times, 0 for what cannot be known or is padding. Rows
    that are not read `in_chunks` show the RoPE layers their whole past.
    """

    inputs: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    weights: Float[Tensor, "b t"]
    pixel_values: Float[Tensor, "tiles c height width"] | None = None
    in_chunks: bool = True

    def to(self, device: str | torch.device) -> "Rows":
        """Move all to a device."""
        pixels = None if self.pixel_values is None else self.pixel_values.to(device)
        return dataclasses.replace(
            self,
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            pixel_values=pixels,
        )


def shifted(
    tokens: Int[np.ndarray, "b t"], weights: Float[np.ndarray, "b t"] | None = None
) -> Rows:
    """Let every token but the last predict the next; `weights` are those of predicting each."""
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    known = torch.ones(ids.shape) if weights is None else torch.from_numpy(weights).float()
    return Rows(ids[:, :-1], ids[:, 1:], known[:, 1:])


def padded(rows: Sequence[Rows], pad_id: int, multiple: int = 32) -> Rows:
    """Stack batches of different lengths, padded on the right to a multiple of so many tokens."""
    length = -(-max(row.inputs.shape[1] for row in rows) // multiple) * multiple

    def stack(name: str, value: int) -> Tensor:
        pieces = [getattr(row, name) for row in rows]
        return torch.cat([F.pad(x, (0, length - x.shape[1]), value=value) for x in pieces])

    pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
    return Rows(
        stack("inputs", pad_id),
        stack("targets", pad_id),
        stack("weights", 0),
        torch.cat(pixels) if pixels else None,
    )


def answers_of(prompt: Prompt, tokenizer: Tokenizer) -> Float[Tensor, "b t"]:
    """Weigh what the assistant says and the end of its turns 1, and everything else 0."""
    header = len(encode_chat(tokenizer, [], add_bos=False, open_assistant=True).ids)
    message = prompt.spans.message
    weights = torch.zeros(message.shape)
    for idx, role in enumerate(prompt.spans.roles):
        if role == "assistant":
            inside = message == idx
            weights[inside & (inside.cumsum(dim=1) > header)] = 1
    return weights
