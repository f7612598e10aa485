"""Muon over stacks of equally shaped matrices."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from llama_lab.training.moments import Bare, keep_moments_in

RMS_OF_ADAMW = 0.2
"""Root mean square of an AdamW step, in learning rates."""


class StackedMuon(Bare, torch.optim.Muon):
    """torch's Muon, with the matrices of one shape orthogonalised together and at a chosen precision.

    A transformer has a few shapes and many matrices of each. One batched product a step of the iteration keeps a GPU from waiting
    for launches and a CPU's cores from splitting small products: half the time for a 3M model on two cores. State and settings are
    those of `torch.optim.Muon`, so either can load what the other saved.

    Args:
        parameters: matrices.
        dtype: what the iteration computes in. torch's own is always bfloat16, which processors without it in hardware emulate
            slowly, and which turns float noise between two ways of adding up a gradient into differences of a thousandth.
        state_dtype: what the momentum is kept in between two steps.
        compiles: whether each shape's step goes through torch.compile, which joins what stands around the products.
        settings: those of `torch.optim.Muon`; `adjust_lr_fn` has to be "match_rms_adamw".
    """

    def __init__(
        self,
        parameters: list[Tensor],
        *,
        dtype: torch.dtype,
        state_dtype: torch.dtype = torch.float32,
        compiles: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(parameters, **settings)
        self._dtype, self._state_dtype, self._compiles = dtype, state_dtype, compiles
        self._move = torch.compile(_move, dynamic=False, fullgraph=True) if compiles else _move

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, whatever its momentum was kept in."""
        super().load_state_dict(state_dict)
        keep_moments_in(self, self._state_dtype)

    def _step_stack(self, parameters: list[Tensor], group: dict[str, Any], unless: Tensor | None) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, dtype=self._state_dtype)
        rate = group["lr"] * RMS_OF_ADAMW * max(parameters[0].shape) ** 0.5
        kept = 1 - group["lr"] * group["weight_decay"]
        if self._compiles or parameters[0].is_cuda:
            # Scalars that change from step to step are tensors: a compiled graph takes them as they come, and would be compiled
            # again for each new number.
            rate, kept = (torch.full((), value, device=parameters[0].device) for value in (rate, kept))
        if unless is not None:
            rate, kept = torch.where(unless, 0.0, rate), torch.where(unless, 1.0, kept)
        self._move(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [self.state[parameter]["momentum_buffer"] for parameter in parameters],
            rate,
            kept,
            unless,
            momentum=group["momentum"],
            is_nesterov=group["nesterov"],
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
            dtype=self._dtype,
        )


def _move(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    rate: Tensor | float,
    kept: Tensor | float,
    unless: Tensor | None,
    *,
    momentum: float,
    is_nesterov: bool,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype,
) -> None:
    """One step of equally shaped matrices, in place.

    Args:
        rate: times the orthogonalised direction is the step.
        kept: what decay leaves of the matrices.
        unless: where true, `rate` is 0, `kept` 1, and the buffers stay.
    """
    is_narrow = buffers[0].dtype is not gradients[0].dtype
    wide = [buffer.to(gradients[0].dtype) for buffer in buffers] if is_narrow else buffers
    if unless is not None:
        # What moves towards itself stays.
        gradients = [torch.where(unless, *pair) for pair in zip(wide, gradients, strict=True)]
    torch._foreach_lerp_(wide, gradients, 1 - momentum)
    directions = torch._foreach_lerp(gradients, wide, momentum) if is_nesterov else wide
    moved = orthogonalised(torch.stack(list(directions)).to(dtype), coefficients, steps, eps)
    torch._foreach_mul_(parameters, kept)
    torch._foreach_sub_(parameters, list((moved.to(parameters[0].dtype) * rate).unbind()))
    if is_narrow:
        torch._foreach_copy_(buffers, wide)


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
