"""Llama 4 in PyTorch: read `text`, then `attention`, `vision`, and `llama4` that joins them."""

from llama4_lab.model.llama4 import Llama4

__all__ = ["Llama4"]
