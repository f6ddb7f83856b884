"""Llama 4, opened up: exact, readable, and every value inside it named."""

from typing import TYPE_CHECKING

from llama4_lab.loading import importing, on_demand

if not TYPE_CHECKING:  # checkers would take any name
    __getattr__ = on_demand(__name__)  # l4.analysis, l4.train, …

with importing():
    from llama4_lab import edits, parallel
    from llama4_lab.cache import KVCache
    from llama4_lab.checkpoint import convert, load, save
    from llama4_lab.config import (
        BEHEMOTH_ESTIMATE,
        MAVERICK,
        SCOUT,
        Llama4Config,
        RopeScaling,
        VisionConfig,
    )
    from llama4_lab.generate import generate
    from llama4_lab.model import Llama4
    from llama4_lab.model.random import random
    from llama4_lab.points import points
    from llama4_lab.replay import Replay
    from llama4_lab.spill import load_trace
    from llama4_lab.trace import intervene, run_with_cache, trace

__all__ = [
    "BEHEMOTH_ESTIMATE",
    "MAVERICK",
    "SCOUT",
    "KVCache",
    "Llama4",
    "Llama4Config",
    "Replay",
    "RopeScaling",
    "VisionConfig",
    "convert",
    "edits",
    "generate",
    "intervene",
    "load",
    "load_trace",
    "parallel",
    "points",
    "random",
    "run_with_cache",
    "save",
    "trace",
]
