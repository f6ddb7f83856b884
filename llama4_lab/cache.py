"""Keys and values of the tokens seen so far.

A RoPE layer attends inside its chunk only, so its buffer holds one chunk, the live part is a
prefix, and it starts over when the chunk is full. A NoPE layer keeps everything. Both grow on
demand. Positions here count a row's real tokens; left padding is never stored.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.config import Llama4Config

Rows = slice | list[int]


class KVCache:
    """What a model needs to go on from where it stopped: ``model(new_ids, cache=cache)``.

    `slots` counts positions fed so far, padding included; `pad` is the left padding of each row.
    Set back, `slots` forgets the last positions, but not those before the chunk under way, which is
    all that RoPE layers keep. After an interrupted forward pass the cache is stale: make a new one.
    `chunks` says for each layer what it may see, where that is not as the config has it.
    """

    def __init__(
        self,
        config: Llama4Config,
        batch_size: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunks: list[int | None] | None = None,
    ):
        if chunks is None:
            chunks = [config.attention_chunk(i) for i in range(config.num_hidden_layers)]
        heads, width = config.num_key_value_heads, config.head_dim
        empty = torch.empty(2, batch_size, heads, 0, width, dtype=dtype, device=device)
        self.layers = [LayerCache(empty, chunk) for chunk in chunks]
        self.batch_size = batch_size
        self.slots = 0
        self.pad = [0] * batch_size

    def bytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(layer.buffer.nbytes for layer in self.layers)


class LayerCache:
    """Keys and values of one layer, ``[2, b, k, s, dh]``; at most one `chunk` of them."""

    def __init__(self, empty: Tensor, chunk: int | None):
        self.buffer = empty
        self.chunk = chunk

    def live(
        self, rows: Rows, start: int
    ) -> tuple[Float[Tensor, "b k s dh"], Float[Tensor, "b k s dh"]]:
        """Return the keys and values that a token at position `start` can still see."""
        count = start if self.chunk is None else start % self.chunk
        keys, values = self.buffer[:, rows, :, :count]
        return keys, values

    def write(
        self, rows: Rows, start: int, k: Float[Tensor, "b k t dh"], v: Float[Tensor, "b k t dh"]
    ) -> None:
        """Store the keys and values of positions ``start``, ``start + 1``, …"""
        end = start + k.shape[2]
        first = start
        if self.chunk is not None:
            if end // self.chunk > start // self.chunk:  # complete: only what is behind it lives on
                first = end - end % self.chunk
            k, v = k[:, :, first - start :], v[:, :, first - start :]
            first, end = first % self.chunk, first % self.chunk + k.shape[2]
        self.reserve(end)
        self.buffer[0, rows, :, first:end] = k
        self.buffer[1, rows, :, first:end] = v

    def reserve(self, count: int) -> None:
        """Make room for so many positions."""
        size = self.buffer.shape[3]
        if count <= size:
            return
        size = max(count, 2 * size, 64)
        size = size if self.chunk is None else min(size, self.chunk)
        grown = self.buffer.new_zeros(*self.buffer.shape[:3], size, self.buffer.shape[4])
        grown[:, :, :, : self.buffer.shape[3]] = self.buffer
        self.buffer = grown


class SharedPast(KVCache):
    """What came before `slots`, the same for all rows, and kept as it is: nothing is stored.

    `keys` and `values` are each layer's ``[1, k, s, dh]``, of all positions up to `slots` or more.
    """

    def __init__(
        self,
        keys: list[Float[Tensor, "1 k s dh"]],
        values: list[Float[Tensor, "1 k s dh"]],
        chunks: list[int | None],
        slots: int,
        batch_size: int,
    ):
        self.layers = [
            _SharedLayer(k, v, chunk, slots, batch_size)
            for k, v, chunk in zip(keys, values, chunks, strict=True)
        ]
        self.batch_size = batch_size
        self.slots = slots
        self.pad = [0] * batch_size


class _SharedLayer(LayerCache):
    def __init__(self, k: Tensor, v: Tensor, chunk: int | None, slots: int, batch_size: int):
        begin = 0 if chunk is None else slots - slots % chunk
        live = torch.stack([k[:, :, begin:slots], v[:, :, begin:slots]])
        super().__init__(live.expand(-1, batch_size, -1, -1, -1), chunk)

    def write(self, rows: Rows, start: int, k: Tensor, v: Tensor) -> None:
        pass
