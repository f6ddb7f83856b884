"""What devices can: products in bfloat16 where they multiply it, float64, or being there at all.

A CPU without units for it takes ten times as long in bfloat16 (one thread of an AMD EPYC with AVX2:
8.7 against 92 GFLOP/s).
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def device_of(given: torch.device | str) -> torch.device:
    """Return a device of this machine.

    Raises:
        ValueError: it has none of that name.
    """
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # so says torch, at length
        gpu = torch.accelerator.current_accelerator(check_available=True)
        found = "cpu" if gpu is None else f"cpu and {gpu.type}"
        raise ValueError(f"no device {str(given)!r} was found: this machine has {found}") from error
    return device


def has_float64(device: torch.device) -> bool:
    """Whether numbers can be so wide there, which they cannot on Apple's GPUs."""
    return device.type in ("cpu", "cuda")


def with_float64(x: Tensor) -> Tensor:
    """Return x where it can be widened: on its own device, or on the CPU."""
    return x if has_float64(x.device) else x.cpu()


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
