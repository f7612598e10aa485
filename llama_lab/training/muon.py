"""Muon over stacks of equally shaped matrices."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class StackedMuon(torch.optim.Muon):
    """torch's Muon, with the matrices of one shape orthogonalised together and at a chosen precision.

    A transformer has a few shapes and many matrices of each. One batched product a step of the iteration keeps a GPU from waiting
    for launches and a CPU's cores from splitting small products: half the time for a 3M model on two cores. State and settings are
    those of `torch.optim.Muon`, so either can load what the other saved.

    Args:
        parameters: matrices.
        dtype: what the iteration computes in. torch's own is always bfloat16, which processors without it in hardware emulate
            slowly, and which turns float noise between two ways of adding up a gradient into differences of a thousandth.
        settings: those of `torch.optim.Muon`; `adjust_lr_fn` has to be "match_rms_adamw".
    """

    def __init__(self, parameters: list[Tensor], *, dtype: torch.dtype, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None, *, unless: Tensor | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient.

        Args:
            unless: a boolean scalar on the device. If it is true, matrices and states keep their values.
        """
        for group in self.param_groups:
            stacks: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    stacks[parameter.shape].append(parameter)
            for parameters in stacks.values():
                self._step_stack(parameters, group, unless)

    def _step_stack(self, parameters: list[Tensor], group: dict[str, Any], unless: Tensor | None) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        if unless is not None:
            # What moves towards itself stays.
            gradients = [torch.where(unless, *pair) for pair in zip(buffers, gradients, strict=True)]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers
        steps = orthogonalised(
            torch.stack(list(directions)).to(self._dtype), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        if unless is None:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        else:
            steps = torch.where(unless, 0.0, steps)
            kept = torch.full((), 1 - group["lr"] * group["weight_decay"], device=steps.device)
            torch._foreach_mul_(parameters, torch.where(unless, 1.0, kept))
        torch._foreach_add_(parameters, list(steps.to(parameters[0].dtype).unbind()), alpha=-group["lr"] * scale)


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Each matrix with its singular values moved near 1, by Newton and Schulz's iteration with a quintic polynomial.

    Args:
        matrices: (stack, rows, columns), in the dtype to compute in.

    Source: Keller Jordan, "Muon" (2024); coefficients and order of operations as in `torch.optim.Muon`.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
