"""Leave routed experts in the files that they are in."""

import torch

from llama4_lab.checkpoint.gguf import GgufFile
from llama4_lab.checkpoint.huggingface import HuggingFaceFolder
from llama4_lab.checkpoint.quantised import OF_PACKED
from llama4_lab.experts.mapped import ExpertMemory
from llama4_lab.model import Llama4
from llama4_lab.model.text import Experts


def leave_experts(
    model: Llama4,
    source: HuggingFaceFolder | GgufFile,
    memory_limit: int | None,
    device: torch.device,
    dtype: torch.dtype | None,
) -> set[str]:
    """Give the layers experts that are read when they are asked for; return their tensors' names.

    Raises:
        ValueError: a model without experts.
    """
    memory, left, largest = ExpertMemory(0), set(), 0
    for path, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        of_layer = 0
        for part in ("gate_up_proj", "down_proj"):
            name, shape = f"{path}.{part}", tuple(getattr(module, part).shape)
            stack = source.mapped(name, shape, memory, device, dtype)
            of_layer += len(stack) * stack.size
            left |= {name, *(name + end for end in OF_PACKED)}
            module.put(part, stack)
        largest = max(largest, of_layer)
    if not left:
        raise ValueError("this model has no experts that could stay in their files")
    memory.limit = 2 * largest if memory_limit is None else memory_limit
    model.expert_memory = memory
    return left
