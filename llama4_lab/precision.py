"""The precision of products: bfloat16 where a device multiplies it, float32 elsewhere.

A CPU without units for it takes ten times as long in bfloat16 (one thread of an AMD EPYC with AVX2:
8.7 against 92 GFLOP/s).
"""

from contextlib import AbstractContextManager

import torch


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which the device multiplies matrices fastest."""
    if device.type != "cpu":
        return torch.bfloat16
    units: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13's
    named = ("avx512_bf16", "amx_bf16", "arm_bf16")
    return torch.bfloat16 if any(units.get(name) for name in named) else torch.float32


def mixed(device: torch.device) -> AbstractContextManager[object]:
    """Multiply in `product_dtype` inside this context, whatever dtype the weights have."""
    dtype = product_dtype(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
