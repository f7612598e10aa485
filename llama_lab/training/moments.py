"""Optimizers' states: what torch keeps for each parameter, and AdamW with moments in bfloat16: half the memory, half the disk.

Each of its steps reads them into float32, and writes them back rounded. Nothing is added that would undo the rounding, so a moment
can only follow what moves it by more than its last digit; the config refuses decays that are too slow for that.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""Names that torch gives to what has the shape of a parameter in an optimizer's state."""


class Bare(torch.optim.Optimizer):
    """torch's optimizers without what keeps torch.compile out of them, for nothing here compiles a call of theirs.

    The first such call of a process would import the compiler: two seconds of a start, as long as torch itself takes.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class NarrowAdamW(Bare, torch.optim.AdamW):
    """AdamW with its state in `torch.optim.AdamW`'s names, so that either can load what the other saved.

    Args:
        groups, settings: those of `torch.optim.AdamW`.
        dtype: of the moments.
        compiles: whether the step goes through torch.compile, which makes one pass over memory of it.
    """

    def __init__(self, groups: list[dict[str, Any]], *, dtype: torch.dtype, compiles: bool, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._dtype = dtype
        # One dimension of any size: one graph for all parameters.
        self._move = torch.compile(_move, dynamic=True, fullgraph=True) if compiles else _move

    @torch.no_grad()
    def step(self, closure: None = None, *, unless: Tensor | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient.

        Args:
            unless: a boolean scalar on the device. If it is true, parameters and states keep their values.
        """
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            device = parameters[0].device
            # Scalars that change from step to step are tensors: a compiled graph takes them as they come.
            moves = torch.ones((), device=device) if unless is None else (~unless).float()
            rate = torch.full((), group["lr"], device=device)
            for parameter in parameters:
                self._step_one(parameter, group, moves, rate)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, whatever its moments were kept in."""
        super().load_state_dict(state_dict)
        keep_moments_in(self, self._dtype)

    def _step_one(self, parameter: Tensor, group: dict[str, Any], moves: Tensor, rate: Tensor) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self._dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self._dtype)
        state["step"] += moves
        beta1, beta2 = group["betas"]
        self._move(
            *(parameter.view(-1), parameter.grad.view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)),
            *(moves, rate, state["step"], beta1, beta2, group["eps"], group["weight_decay"]),
        )


def _move(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    moves: Tensor,
    rate: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step, in place, where `moves` is 1; none where it is 0, whatever the gradient is."""
    goes = moves > 0
    m = torch.lerp(first.float(), gradient, 1 - beta1)
    v = torch.lerp(second.float(), gradient.square(), 1 - beta2)
    # At step 0, which is not made, the corrections would be divisions by zero.
    step = step.clamp(min=1)
    root = (v / (1 - beta2**step)).sqrt() + eps
    moved = parameter * (1 - rate * weight_decay) - rate / (1 - beta1**step) * m / root
    parameter.copy_(torch.where(goes, moved, parameter))
    first.copy_(torch.where(goes, m.to(first.dtype), first))
    second.copy_(torch.where(goes, v.to(second.dtype), second))


def keep_moments_in(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    """Turn what was loaded back into `dtype`: torch loads every state in its parameter's dtype."""
    for state in optimizer.state.values():
        for name in MOMENTS:
            if name in state:
                state[name] = state[name].to(dtype)
    keep_counts_beside(optimizer)


def keep_counts_beside(optimizer: torch.optim.Optimizer) -> None:
    """Put the counts of steps that were loaded where the parameters are: torch leaves them on the CPU unless the optimizer that
    saved them was fused."""
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
