"""What is trained, on what, and for how long: the recipes of the shipped models."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from llama4_lab.config import Llama4Config, VisionConfig
from llama4_lab.train.arithmetic import KINDS
from llama4_lab.train.lessons import Echo, Lesson, Needle, Pictures, Sums, Text
from llama4_lab.train.scenes import ONE_PICTURE
from llama4_lab.train.shapes import TILE

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
class Stage:
    """What is taught for a `share` of the run; a step holds the rows of all lessons.

    With `goal`, a lesson's name and a share of right guesses, the stage ends early when the mean
    of the last ten steps is as good as that, and the later stages share what is left.
    """

    share: float
    lessons: tuple[Lesson, ...]
    goal: tuple[str, float] | None = None


@dataclass(frozen=True)
class Recipe:
    """A model and the settings that trained it.

    The vision encoder learns to see for `vision_steps` steps before anything else. The learning
    rates are constant after `warmup` steps and fall linearly to zero over the last `cooldown` share
    of the run. The weight of the balancing loss falls from `balance` to `balance_end` over the
    first half: strong while no expert may die, weak once they are to differ. With a `bias_rate`
    (0.001 to 0.005) experts are also balanced by a bias, see `llama4_lab.train.balance.Bias`.
    """

    name: str
    config: Llama4Config
    stages: tuple[Stage, ...]
    steps: int
    minutes: float | None = None  # on one core, instead of `steps`
    warmup: int = 50
    cooldown: float = 0.4
    vision_steps: int = 380
    matrix_lr: float = 0.02
    vision_lr: float = 0.005  # of the encoder's matrices, which have learnt to see before
    adam_lr: float = 3e-3
    embed_lr: float = 0.02
    embed_std: float = 0.1  # to begin with
    balance: float = 0.003
    balance_end: float = 0.0005
    bias_rate: float = 0.0
    seed: int = 0

    @property
    def domains(self) -> list[str]:
        """The domains of text that the lessons read."""
        lessons = [lesson for stage in self.stages for lesson in stage.lessons]
        texts = [lesson.domains for lesson in lessons if isinstance(lesson, Text)]
        return list(dict.fromkeys(name for domains in texts for name in domains))

    def without(self, domains: Collection[str]) -> "Recipe":
        """Leave domains of text out; the others take their rows."""

        def left(lesson: Lesson) -> Lesson:
            if not isinstance(lesson, Text):
                return lesson
            shares = {k: share for k, share in lesson.domains.items() if k not in domains}
            return replace(lesson, domains=shares)

        stages = (replace(each, lessons=tuple(map(left, each.lessons))) for each in self.stages)
        return replace(self, stages=tuple(stages))


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


def small_vision(hidden_size: int, layers: int, heads: int, text_size: int) -> VisionConfig:
    """A vision encoder for tiles of 48 pixels, 36 image tokens each, beside a small text model."""
    return VisionConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        image_size=TILE,
        patch_size=4,
        projector_input_dim=text_size,
        projector_output_dim=text_size,
        vision_output_dim=text_size,
    )


SEVERAL = ("motion", "picture")
TILES = ((1, 2), (2, 1), (2, 2))
WORDS = Stage(0.12, (Text(12, domains=TEXT, length=256),))
MATCH = Stage(
    0.38,
    (
        Text(2, domains=TEXT, length=256),
        Echo(24, 2.0, label="echo_near", length=64, periods=(3, 10), vocabulary=64),
        Echo(6, 2.0, periods=(3, 48), vocabulary=64),
    ),
    goal=("echo", 0.7),
)
LOOKED_UP = (*ONE_PICTURE, *("colour", "place", "count", "exists") * 3)
"""Tasks about one picture; what has to be looked up by another attribute is learnt last."""
NAMED = (*ONE_PICTURE, "scan", "shape_at", "shape", "colour_at")
"""The same for a model that will hardly get there: what is seen at a place is asked more."""
SHORT = Stage(
    0.35,
    (
        Text(5, 3.0, domains=TEXT),
        Needle(6, 1.0, label="near_codes", length=128, kind="words", facts=(1, 3)),
        Needle(1, 0.5, label="codes", kind="words", facts=(2, 8)),
        Sums(10, 2.0),
        Pictures(24, 3.0, tasks=LOOKED_UP),
        Pictures(2, 0.5, label="tiles", length=256, tasks=LOOKED_UP, tiles=TILES),
        Pictures(8, 1.5, label="several", length=256, tasks=SEVERAL),
    ),
)
LONG = Stage(
    0.15,
    (
        Text(2, 3.0, domains=TEXT),
        Text(1, 1.0, "long_text", TEXT, length=2048),
        Needle(1, 0.5, label="far_codes", kind="prose", length=2048, facts=(4, 8)),
        Needle(1, 0.5, "whole_codes", 1024, kind="prose", facts=(4, 8), in_chunks=False),
        Needle(1, 0.5, label="codes", kind="prose", facts=(2, 8)),
        Sums(8, 2.0),
        Pictures(20, 3.0, tasks=LOOKED_UP),
        Pictures(3, 0.5, label="tiles", length=256, tasks=LOOKED_UP, tiles=TILES),
        Pictures(8, 1.5, label="several", length=256, tasks=SEVERAL),
    ),
)
SIMPLE = ("larger", "smaller", "multiply", *KINDS)
"""Kinds of sums for a model that learns to compare long before it learns to add."""
SMALL_MATCH = replace(MATCH, share=0.2)  # often not learnt: then time is better spent on the rest
SMALL_SHORT = Stage(
    0.4,
    (
        Text(4, 3.0, domains=TEXT),
        Needle(6, 1.0, label="codes", length=128, kind="words", facts=(1, 3)),
        Sums(8, 2.0, kinds=SIMPLE),
        Pictures(24, 3.0, tasks=NAMED),
        Pictures(1, 0.3, label="tiles", length=256, tiles=TILES),
        Pictures(1, 0.3, label="several", length=256, tasks=SEVERAL),
    ),
)
SMALL_LONG = Stage(
    0.1,
    (
        Text(2, 3.0, domains=TEXT),
        Text(1, 1.0, "long_text", TEXT, length=2048),
        Needle(1, 0.5, label="far_codes", kind="prose", length=1024, facts=(4, 8)),
        Needle(4, 1.0, label="codes", length=128, kind="prose", facts=(1, 3)),
        Sums(8, 2.0, kinds=SIMPLE),
        Pictures(20, 3.0, tasks=NAMED),
        Pictures(1, 0.3, label="tiles", length=256, tiles=TILES),
        Pictures(1, 0.3, label="several", length=256, tasks=SEVERAL),
    ),
)
MINI = Recipe(
    "mini",
    small_config(vision_config=small_vision(128, 3, 4, 256)),
    stages=(WORDS, MATCH, SHORT, LONG),
    steps=2000,
)
NANO = Recipe(
    "nano",
    small_config(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        intermediate_size_mlp=256,
        vision_config=small_vision(64, 2, 2, 128),
    ),
    stages=(WORDS, SMALL_MATCH, SMALL_SHORT, SMALL_LONG),
    steps=1600,
    minutes=27.0,
    matrix_lr=0.04,
)
RECIPES = {recipe.name: recipe for recipe in (MINI, NANO)}
