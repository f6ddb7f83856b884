"""Train the shipped models: data, curriculum, loop."""

from typing import TYPE_CHECKING

from llama4_lab.loading import on_demand

if not TYPE_CHECKING:
    __getattr__ = on_demand(__name__)
