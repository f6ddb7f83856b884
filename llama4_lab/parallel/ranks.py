"""How a model's weights and values lie on the ranks, and how these speak with each other.

Weights and values are plain tensors: dispatching a DTensor costs more than the kernels of a decode
step. DTensor says how watched values lie on the ranks.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llama4_lab.checkpoint.files import fill
from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.model.llama4 import Alone
from llama4_lab.plan import divided

EXPERTS = ("sliced", "placed")

# The axis of a weight that is divided, by the end of its name; the others are whole on every rank.
_AXIS = dict.fromkeys(("lm_head.weight", "gate_proj.weight", "up_proj.weight"), 0)
_AXIS |= {f"{x}_proj.{kind}": 0 for x in "qkv" for kind in ("weight", "bias")}
_AXIS |= dict.fromkeys(("o_proj.weight", "down_proj.weight"), 1)
_EXPERTS_AXIS = {
    "sliced": {"experts.gate_up_proj": 1, "experts.down_proj": 2},
    "placed": {"experts.gate_up_proj": 0, "experts.down_proj": 0},
}

# The axis of a layer's value that is divided; and the values that are sums over the ranks.
_VALUE_AXIS = {f"attn.{x}": 2 for x in ("q", "k", "v", "rot_q", "rot_k", "z")}
_VALUE_AXIS |= {"attn.scores": 1, "attn.pattern": 1, "mlp.hidden": -1}
_SUMS = ("shared.out",)


class Ranks(Alone):
    """What this rank holds of a model, and how it speaks with the others.

    Raises:
        ValueError: a mesh or a choice that is impossible, or a model that cannot be divided so.
    """

    def __init__(self, mesh: DeviceMesh, config: Llama4Config, experts: str):
        if experts not in EXPERTS:
            raise ValueError(f"experts={experts!r} is unknown; choose {' or '.join(EXPERTS)}")
        if mesh.ndim != 1:
            raise ValueError(
                f"a mesh of {mesh.ndim} dimensions was given: choose one of them, mesh[name]"
            )
        check(config, mesh.size(), experts)
        self.mesh = mesh
        self.group = mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.device = torch.device(mesh.device_type)
        self.experts = experts
        self.axes = _AXIS | _EXPERTS_AXIS[experts]
        self.value_axes, self.sums = _VALUE_AXIS, _SUMS
        if experts == "sliced":
            self.value_axes = _VALUE_AXIS | {"experts.hidden": -1}
            self.sums = (*_SUMS, "experts.out")

    # ---- weights

    def take(self, model: Llama4, name: str, whole: Tensor) -> None:
        """Put this rank's part of a parameter or buffer into the model, in the model's dtype."""
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        held = getattr(module, leaf)
        part = self.part(name, whole, held.dtype)
        is_parameter = isinstance(held, nn.Parameter)
        setattr(module, leaf, nn.Parameter(part, requires_grad=False) if is_parameter else part)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape

    def part(self, name: str, whole: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy this rank's part, reading nothing else: weights, or codes or scales of packed ones.

        Raises:
            ValueError: scales that stand for weights of two ranks.
        """
        weight = name.removesuffix("_codes").removesuffix("_scales")
        end = ".".join(weight.split(".")[-2:])
        axis = None if name.startswith("vision_model.") else self.axes.get(end)
        if name.endswith("_scales") and axis == whole.ndim - 1:
            groups = whole.shape[-1]
            if whole.dtype == torch.float32:  # fp8: one for a whole row
                axis = None
            elif groups % self.size:
                raise ValueError(
                    f"{weight} has rows of {groups} group{'s' * (groups > 1)} of packed weights, "
                    f"which cannot be divided among {self.size} ranks: take weights that are not "
                    "packed, or other ranks"
                )
        has_halves = end == "experts.gate_up_proj" and axis == 1
        if has_halves:  # each rank takes its rows of the gates and of the ups
            whole, axis = rearrange(whole, "e (half f) d -> e half f d", half=2), 2
        view = whole if axis is None else whole.chunk(self.size, dim=axis)[self.rank]
        copy = torch.empty(view.shape, dtype=dtype, device=self.device)
        for to, source in _matrices(copy, view):
            fill(to, source)
        if end == "o_proj.bias" and self.rank and not name.startswith("vision_model."):
            copy.zero_()  # the sum over the ranks counts it once
        return copy.flatten(1, 2) if has_halves else copy

    # ---- values

    def sum(self, value: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Add a value over all ranks, in its own memory.

        Raises:
            RuntimeError: a value with gradients, which would be those of one rank's part.
        """
        if value.requires_grad:
            raise RuntimeError(
                "gradients do not cross ranks: run a parallel model under torch.no_grad(), or "
                "load it whole on one device"
            )
        dist.all_reduce(value, group=self.group)
        return value

    def gather(self, value: Float[Tensor, "*axes part"]) -> Float[Tensor, "*axes whole"]:
        """Put all ranks' parts of the last axis next to each other."""
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def whole(self, name: str, value: Tensor) -> Tensor:
        """Return a layer's value as one process would have it, on every rank."""
        from torch.distributed.tensor import DTensor, Partial, Shard  # takes most of a second

        if name in self.sums:
            lies = Partial()
        elif name in self.value_axes:
            lies = Shard(self.value_axes[name] % value.ndim)
        else:
            return value
        return DTensor.from_local(value, self.mesh, [lies], run_check=False).full_tensor()

    def mine(self, name: str, value: Tensor) -> Tensor:
        name = name.split(".", 2)[2] if name.startswith("layers.") else name
        if name in self.sums:  # the sum over the ranks counts it once
            return value if self.rank == 0 else torch.zeros_like(value)
        if name in self.value_axes:
            return value.chunk(self.size, dim=self.value_axes[name])[self.rank].contiguous()
        return value

    def agreed(self, value: Tensor) -> Tensor:
        dist.broadcast(value, dist.get_global_rank(self.group, 0), group=self.group)
        return value


def _matrices(copy: Tensor, view: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what `fill` takes at once: everything, or expert by expert where they have halves."""
    yield from zip(copy, view, strict=True) if view.ndim == 4 else [(copy, view)]


def check(config: Llama4Config, size: int, experts: str) -> None:
    """See that a model can be divided among so many ranks.

    Raises:
        ValueError: naming what cannot be divided, and the numbers of ranks that are possible.
    """
    counts = divided(config)
    if config.routed_layers and experts == "placed":
        counts["experts"] = config.num_local_experts
    common = math.gcd(*counts.values())
    possible = " or ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    for what, count in counts.items():
        if count % size:
            hint = ', or choose experts="sliced"' if what == "experts" else ""
            raise ValueError(
                f"{count} {what} cannot be divided among {size} ranks: start {possible}{hint}"
            )
