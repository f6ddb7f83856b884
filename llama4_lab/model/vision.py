"""The vision encoder: tiles of pixels in, image tokens out.

A ViT per tile with the class token in the last slot, two-dimensional RoPE, then 2x2 blocks of
patches shuffled into one token each, and a two-layer adapter. Tiles do not see each other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from llama4_lab.config import VisionConfig
from llama4_lab.model.attention import full, observed
from llama4_lab.model.linear import Linear
from llama4_lab.model.text import rotate, turns
from llama4_lab.points import Tap


def patch_angles(config: VisionConfig) -> Float[Tensor, "slots half"]:
    """Return radians for each patch slot and pair of a head.

    The first half of the pairs turns with the column, the second with the row, both counted from
    one; the class token, in the last slot, is not turned.
    """
    pairs = config.hidden_size // config.num_attention_heads // 2
    on_cpu: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
    freq = config.rope_theta ** (-torch.arange(0, pairs, 2, **on_cpu) / pairs)
    place = torch.arange(1, config.grid + 1, **on_cpu)
    column, row = place.repeat(config.grid), place.repeat_interleave(config.grid)
    angles = torch.cat([column[:, None] * freq, row[:, None] * freq], dim=1)
    return F.pad(angles, (0, 0, 0, 1))


def pixel_shuffle(x: Float[Tensor, "b patches d"], block: int) -> Float[Tensor, "b tokens wide"]:
    """Put each block of patches into the channels of one token: row in block, column, channel."""
    side = round(x.shape[1] ** 0.5)
    return rearrange(
        x,
        "b (y dy x dx) d -> b (y x) (dy dx d)",
        y=side // block,
        x=side // block,
        dy=block,
        dx=block,
    )


class VisionAttention(nn.Module):
    """Attention of all patches of a tile to all, without a mask, with as many keys as queries."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        d = config.hidden_size
        self.q_proj, self.k_proj = Linear(d, d), Linear(d, d)
        self.v_proj, self.o_proj = Linear(d, d), Linear(d, d)
        self.head_dim = d // config.num_attention_heads

    def forward(self, x: Float[Tensor, "b t d"], turn: Tensor, tap: Tap) -> Float[Tensor, "b t d"]:
        q, k, v = (
            rearrange(project(x), "b t (h dh) -> b t h dh", dh=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = tap("attn.q", q), tap("attn.k", k), tap("attn.v", v)
        q, k = tap("attn.rot_q", rotate(q, turn)), tap("attn.rot_k", rotate(k, turn))
        q, k, v = (rearrange(y, "b t h dh -> b h t dh") for y in (q, k, v))
        if tap.watches("attn.scores") or tap.watches("attn.pattern"):
            z = observed(q, k, v, None, tap)
        else:
            z = full(q, k, v)
        z = tap("attn.z", rearrange(z, "b h t dh -> b t h dh"))
        return tap("attn.out", self.o_proj(rearrange(z, "b t h dh -> b t (h dh)")))


class VisionMLP(nn.Module):
    """Two layers with a GELU between them; text's is gated."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "b t d"], tap: Tap) -> Float[Tensor, "b t d"]:
        return tap("mlp.out", self.fc2(tap("mlp.hidden", F.gelu(self.fc1(x)))))


class VisionLayer(nn.Module):
    """As text's `DecoderLayer`, but normed by LayerNorm, with mean and bias."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.self_attn = VisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
        self.mlp = VisionMLP(config)

    def forward(self, x: Float[Tensor, "b t d"], turn: Tensor, tap: Tap) -> Float[Tensor, "b t d"]:
        x = tap("resid_pre", x)
        x = tap("resid_mid", x + self.self_attn(self.input_layernorm(x), turn, tap))
        return tap("resid_post", x + self.mlp(self.post_attention_layernorm(x), tap))


class VisionEncoder(nn.Module):
    """All layers; a module of its own only because the checkpoint calls it ``model``."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Float[Tensor, "b t d"], turn: Tensor, tap: Tap) -> Float[Tensor, "b t d"]:
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, tap.scope(f"layers.{i}."))
        return x


class PatchEmbedding(nn.Module):
    """A convolution without overlap, as the product that it is: a row of pixels for each patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        pixels = config.num_channels * config.patch_size**2
        self.linear = Linear(pixels, config.hidden_size, bias=False)

    def forward(self, pixels: Float[Tensor, "b c height width"]) -> Float[Tensor, "b patches d"]:
        p = self.patch_size
        return self.linear(rearrange(pixels, "b c (y dy) (x dx) -> b (y x) (c dy dx)", dy=p, dx=p))


class Adapter(nn.Module):
    """Pixel shuffle, then two layers; the second one is followed by a GELU too."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.block = config.shuffle
        self.mlp = nn.ModuleDict(
            {
                "fc1": Linear(config.intermediate_size, config.projector_input_dim, bias=False),
                "fc2": Linear(config.projector_output_dim, config.projector_output_dim, bias=False),
            }
        )

    def forward(self, x: Float[Tensor, "b patches d"]) -> Float[Tensor, "b tokens out"]:
        x = F.gelu(self.mlp["fc1"](pixel_shuffle(x, self.block)))
        return F.gelu(self.mlp["fc2"](x))


class VisionModel(nn.Module):
    """Tiles to image tokens, before they are projected to the text width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(d))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(config.grid**2 + 1, d))
        self.patch_embedding = PatchEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(d)
        self.model = VisionEncoder(config)
        self.layernorm_post = nn.LayerNorm(d)
        self.vision_adapter = Adapter(config)

    def forward(
        self, pixels: Float[Tensor, "b c height width"], tap: Tap
    ) -> Float[Tensor, "b tokens out"]:
        x = self.patch_embedding(pixels)
        x = torch.cat([x, self.class_embedding.expand(len(x), 1, -1)], dim=1)
        x = tap("embed", self.layernorm_pre(x + self.positional_embedding_vlm))
        x = self.model(x, turns(patch_angles(self.config).to(x.device)), tap)
        x = self.layernorm_post(x)[:, :-1]
        return tap("out", self.vision_adapter(x))
