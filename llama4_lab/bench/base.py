"""What every stage of the bench gets, and the rows that it yields."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from llama4_lab.bench.clock import Clock
from llama4_lab.bench.weights import seeded_model
from llama4_lab.config import SCOUT, Llama4Config
from llama4_lab.hardware import GPU
from llama4_lab.model import Llama4
from llama4_lab.plan import Plan

MEMORY = 80e9  # bytes that the run may take, so that it stands for one H100


@dataclass(frozen=True)
class Scale:
    """How large things are: rows and tokens."""

    decode: dict[int, int]  # rows -> tokens of context, as many as 80 GB hold beside Scout
    prompts: tuple[int, ...]
    long: tuple[int, ...]  # contexts of one row; whole chunks, so that the last is full
    layer_rows: tuple[int, ...]
    layer_prompt: int
    tiles: int
    copied: int  # bytes
    square: int  # rows and columns of the product that measures the matrix rate


SCALES = {
    "full": Scale(
        decode={1: 4096, 8: 4096, 64: 1024},
        prompts=(512, 8192, 32768),
        long=(16 * 8192, 37 * 8192),
        layer_rows=(1, 8, 64),
        layer_prompt=8192,
        tiles=4,
        copied=2**32,
        square=8192,
    ),
    "tiny": Scale(
        decode={1: 24, 3: 20},
        prompts=(8, 40),
        long=(48,),
        layer_rows=(1, 4),
        layer_prompt=32,
        tiles=1,
        copied=2**20,
        square=64,
    ),
}


def shrunk(config: Llama4Config) -> Llama4Config:
    """Return a config of the same kinds of layers that a CPU runs in no time."""
    vision, routed, experts = config.vision_config, len(config.routed_layers), 4
    step = 0 if not routed else 1 if routed == config.num_hidden_layers else 2
    if vision is not None:
        vision = replace(
            vision,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            image_size=24,
            patch_size=4,
            projector_input_dim=32,
            projector_output_dim=32,
            vision_output_dim=32,
        )
    return config.replace(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        intermediate_size_mlp=128,
        num_local_experts=experts,
        num_experts_per_tok=min(config.num_experts_per_tok, experts),
        interleave_moe_layer_step=step,
        moe_layers=None,
        no_rope_layers=None,
        attention_chunk_size=16,
        bos_token_id=200,
        pad_token_id=201,
        image_token_index=202,
        vision_config=vision,
    )


@dataclass(frozen=True)
class Goal:
    """A number that a row is held against: its share of the roofline, or its value."""

    number: float
    of_share: bool = False
    at_most: bool = False

    def __str__(self) -> str:
        number = f"{self.number:.0%}" if self.of_share else figure(self.number)
        return ("≤ " if self.at_most else "≥ ") + number


HEAD = f"{'':46} {'measured':>17}  share       goal         peak"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: float
    unit: str
    share: float | None = None  # of the roofline that the same run's rates allow
    goal: Goal | None = None
    peak: float | None = None  # bytes
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None:
            return None
        found = self.share if self.goal.of_share else self.value
        assert found is not None
        return found <= self.goal.number if self.goal.at_most else found >= self.goal.number

    def __str__(self) -> str:
        """Return the line of the table, in the columns of `HEAD`."""
        cells = [f"{self.what:46} {figure(self.value):>8} {self.unit:8}"]
        cells.append(f"{self.share:>5.0%}" if self.share is not None else " " * 5)
        verdict = {None: "", True: "met", False: "missed"}[self.is_met]
        goal = "" if self.goal is None else str(self.goal)
        cells.append(f"{goal:>9} {verdict:6}")
        cells.append(f"{self.peak / 1e9:>6.1f} GB" if self.peak is not None else "")
        line = "  ".join(cells).rstrip()
        return f"{line}\n    {self.note}" if self.note else line


def figure(number: float) -> str:
    """Return a number with four digits, or all before the point.

    >>> figure(23017.9), figure(0.123456)
    ('23,018', '0.1235')
    """
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def counted(number: int, what: str) -> str:
    """Return a number of things.

    >>> counted(1, "row"), counted(8192, "token")
    ('1 row', '8,192 tokens')
    """
    return f"{number:,} {what}" + ("" if number == 1 else "s")


class Bench:
    """A device, its measured rates, and the model under test, which is built at its first use."""

    def __init__(
        self, config: Llama4Config, kind: str, scale: str, device: torch.device, seed: int = 0
    ):
        self.config = config
        self.kind = kind
        self.scale = SCALES[scale]
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.seed = seed
        self.clock = Clock(device)
        self.gpu = GPU(device.type, MEMORY, 1.0, 1.0, 1.0)  # until `rates` has measured
        self.has_goals = scale == "full" and kind == "int4" and config == SCOUT
        if self.clock.is_cuda:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY / total), device)

    @property
    def plan(self) -> Plan:
        return Plan(self.config, self.gpu, weights=self.kind)

    @cached_property
    def model(self) -> Llama4:
        return seeded_model(self.config, self.kind, self.seed, self.device)

    def generator(self, seed: int = 1) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(seed)

    def ids(self, rows: int, tokens: int) -> torch.Tensor:
        """Return seeded tokens, drawn uniformly from those that are not special."""
        size = self.config.vocab_size
        top = min(size, self.config.bos_token_id or size)
        shape = (rows, tokens)
        return torch.randint(top, shape, generator=self.generator(), device=self.device)

    def goal(self, number: float, *, of_share: bool = False, at_most: bool = False) -> Goal | None:
        """Return a goal where the bench runs what goals were set for: Scout, whole, in int4."""
        return Goal(number, of_share, at_most) if self.has_goals else None
