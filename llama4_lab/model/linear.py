"""Linear layers and embeddings whose weights are put in later: loaded, seeded, packed or mapped."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama4_lab.experts.mapped import Mapped
from llama4_lab.packed import Packed, kind_of, linear


class Packable(nn.Module):
    """A module whose weights may be `Packed`: two buffers, of codes and scales, stand for each.

    ``module.weight`` is then a `Packed`, not a parameter. The buffers move with the module, but
    keep their dtypes when it changes its own. A `Mapped` one is no part of the module's state.
    """

    def put(self, name: str, weight: Packed | Mapped) -> None:
        """Put a weight in the place of a parameter or of an earlier one."""
        for held in (self._parameters, vars(self)):
            held.pop(name, None)
        for part in ("_codes", "_scales"):
            self._buffers.pop(name + part, None)
        if isinstance(weight, Mapped):
            setattr(self, name, weight)
            return
        self.register_buffer(f"{name}_codes", weight.codes)
        self.register_buffer(f"{name}_scales", weight.scales)

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__.get("_buffers", {})
        if (codes := held.get(f"{name}_codes")) is not None:
            return Packed(kind_of(codes), codes, held[f"{name}_scales"])
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packable":
        def as_bytes(tensor: Tensor) -> Tensor:
            if any(tensor is buffer for buffer in self._buffers.values()):
                return fn(tensor.view(torch.uint8)).view(tensor.dtype)
            return fn(tensor)

        for name, weight in vars(self).items():
            if isinstance(weight, Mapped):
                setattr(self, name, weight.moved(fn))
        return super()._apply(as_bytes, recurse)


class Linear(Packable, nn.Linear):
    """A linear layer whose weights are left as they are, to be loaded or seeded.

    Drawing numbers for them would take time, and on the meta device a second of imports.
    """

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch out"]:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """An embedding whose weights are left as they are, to be loaded or seeded."""

    def reset_parameters(self) -> None:
        pass
