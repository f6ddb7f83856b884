"""Which experts the tokens of one prompt chose, and how close each choice was."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt
from llama4_lab.trace import trace


@dataclass(frozen=True, eq=False)
class Routing:
    """The routers' decisions about one prompt; the axis l runs over `layers`, MoE layers only."""

    tokens: list[str]
    layers: tuple[int, ...]
    logits: Float[np.ndarray, "l n e"]
    expert: Int[np.ndarray, "l n topk"]  # strongest first
    score: Float[np.ndarray, "l n topk"]  # sigmoid of the chosen logits, in (0, 1)
    runner_up: Int[np.ndarray, "l n"]  # the best expert not chosen; -1 if all are chosen
    margin: Float[np.ndarray, "l n"]  # logits from the runner-up up to the weakest chosen expert

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def _next_best(
    logits: Float[Tensor, "l n e"], expert: Int[Tensor, "l n topk"]
) -> tuple[Int[Tensor, "l n"], Float[Tensor, "l n"]]:
    """Find the best expert that was not chosen, and how far below the weakest chosen one it is."""
    weakest = logits.gather(-1, expert).amin(dim=-1)
    best, runner_up = logits.scatter(-1, expert, float("-inf")).max(dim=-1)
    return runner_up.masked_fill(best == float("-inf"), -1), weakest - best


def _numpy(x: Tensor) -> np.ndarray:
    return (x.float() if x.is_floating_point() else x).cpu().numpy()
