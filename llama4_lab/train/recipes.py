"""What is trained, on what, and for how long: the recipes of the shipped models."""

from dataclasses import dataclass, field

from llama4_lab.config import Llama4Config

TEXT = {
    "english": 27.0,
    "python": 22.0,
    "german": 9.0,
    "french": 9.0,
    "spanish": 8.0,
    "russian": 10.0,
    "chinese": 10.0,
    "arithmetic": 5.0,
}
"""Share of rows by domain, in percent."""


@dataclass(frozen=True)
class Recipe:
    """A model and the settings that trained it.

    ``rows`` rows of ``length`` tokens make one step; the learning rates are constant after
    `warmup` steps and fall linearly to zero over the last `cooldown` share of the steps. The
    weight of the balancing loss falls from `balance` to `balance_end` over the first half: strong
    while no expert may die, weak once they are to differ.
    """

    name: str
    config: Llama4Config
    weights: dict[str, float] = field(default_factory=lambda: dict(TEXT))
    rows: int = 16
    length: int = 512
    steps: int = 2000
    warmup: int = 50
    cooldown: float = 0.4
    matrix_lr: float = 0.02
    adam_lr: float = 3e-3
    balance: float = 0.01
    balance_end: float = 0.001
    seed: int = 0


def small_config(vocab_size: int = 4096, **changes: object) -> Llama4Config:
    """Every mechanism of Scout at a size that a laptop trains: sizes of `mini` unless changed."""
    specials = vocab_size - 32
    return Llama4Config(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=256,
        intermediate_size_mlp=512,
        num_local_experts=8,
        attention_chunk_size=128,
        floor_scale=128,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        bos_token_id=specials,
        eos_token_id=(specials + 1, specials + 4, specials + 5),
        pad_token_id=specials + 9,
        boi_token_index=specials + 10,
        eoi_token_index=specials + 11,
        image_token_index=specials + 15,
    ).replace(**changes)


MINI = Recipe("mini", small_config())
NANO = Recipe(
    "nano",
    small_config(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        intermediate_size_mlp=256,
    ),
    steps=1200,
    rows=8,
)
RECIPES = {recipe.name: recipe for recipe in (MINI, NANO)}
