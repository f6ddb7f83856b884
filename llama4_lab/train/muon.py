"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal before they are applied.

torch.optim.Muon takes two-dimensional parameters only; expert weights are stacks of matrices
``[e, out, in]``, which this one orthogonalises as a batch.
"""

import torch
from torch import Tensor

from llama4_lab.precision import product_dtype

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix ``[…, out, in]`` by values near one.

    A quintic Newton-Schulz iteration, in bfloat16 where that is fast; its coefficients trade
    exactness for speed, so that the values end between about 0.7 and 1.2.
    """
    a, b, c = _NEWTON_SCHULZ
    x = g.to(product_dtype(g.device))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled by ``sqrt(max(1, out / in))``.

    Each parameter's group may set ``lr`` and ``weight_decay`` (decoupled).
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)
