"""Optimizers: which parameter is updated by which rule, at which peak learning rate, with how much decay."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import AdamWConfig, MuonConfig, OptimConfig, Precision, StateDtype
from llama_lab.training.moments import Bare, NarrowAdamW, keep_counts_beside
from llama_lab.training.muon import StackedMuon

# Kinds of device where the host need not know whether a step is made: on a CPU it knows anyway, and for MPS the fused kernel makes
# every step that it is given.
DECIDING_DEVICES = ("cuda",)
_DTYPES = {StateDtype.fp32: torch.float32, StateDtype.bf16: torch.bfloat16}


class AdamW(Bare, torch.optim.AdamW):
    """torch's AdamW. Its fused kernel leaves everything as it is where `found_inf`, a float32 scalar on the device, is 1."""

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        inspect.unwrap(torch.optim.AdamW.step)(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, whichever kind of AdamW saved it."""
        super().load_state_dict(state_dict)
        keep_counts_beside(self)


class Optimizers:
    """One or several torch optimizers behind the face of one. Each group remembers its peak learning rate.

    Settings come from the config, never from a saved state, so a resumed run follows what it is told.
    """

    def __init__(self, parts: dict[str, torch.optim.Optimizer]) -> None:
        self._parts = parts
        self._peaks = {name: [group["lr"] for group in part.param_groups] for name, part in parts.items()}

    @property
    def parts(self) -> dict[str, torch.optim.Optimizer]:
        """The torch optimizers by name: `muon`, `adamw`."""
        return self._parts

    def step(self, *, unless: Tensor | None = None) -> None:
        """Update every parameter from its gradient.

        Args:
            unless: a boolean scalar where the parameters are. If it is true, parameters and states keep their values. On CUDA the
                host neither waits nor learns of it where the optimizers are those of this package.
        """
        if unless is not None and unless.device.type not in DECIDING_DEVICES:
            if bool(unless):
                return
            unless = None
        for part in self._parts.values():
            match part:
                case AdamW():
                    part.found_inf = None if unless is None else unless.float()
                    part.step()
                case StackedMuon() | NarrowAdamW():
                    part.step(unless=unless)
                case _:  # any other of torch's; the host has to wait for the answer
                    if unless is None or not bool(unless):
                        part.step()

    def zero_grad(self) -> None:
        """Forget all gradients, and free their memory."""
        for part in self._parts.values():
            part.zero_grad(set_to_none=True)

    def set_lr_factor(self, factor: float) -> None:
        """Set every group's learning rate to `factor` of its peak."""
        for name, part in self._parts.items():
            for group, peak in zip(part.param_groups, self._peaks[name], strict=True):
                group["lr"] = peak * factor

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on besides weights, gradients and config: tensors and plain types only."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same optimizers over the same parameters. Rates, decay and the like stay as configured.

        Raises:
            ValueError: the state is of other optimizers, or of parameters in other groups.
        """
        if state.keys() != self._parts.keys():
            raise ValueError(f"the state is of {sorted(state)}, the run's optimizers are {sorted(self._parts)}")
        for name, part in self._parts.items():
            configured = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
            part.load_state_dict(state[name])
            for group, settings in zip(part.param_groups, configured, strict=True):
                group.update(settings)


def build_optimizer(
    model: nn.Module, optim: OptimConfig, device_type: str, precision: Precision, *, compiles: bool = False
) -> Optimizers:
    """The optimizer that the config asks for, over all of the model's parameters, in the model's order.

    Muon takes the matrices inside the blocks. Embedding and output projection are lookups by token rather than maps between
    activations, so they stay with AdamW, as do gains. Muon's step is scaled to the root mean square of AdamW's, so that both
    kinds of `max_lr` are of one size. Only matrices decay: a gain has no reason to be zero.

    Args:
        device_type: where the parameters are; AdamW is one fused kernel on devices that have it.
        precision: of the run, which Muon's iteration follows.
        compiles: whether steps that are not one kernel anyway go through torch.compile.

    Raises:
        ConfigError: the optimizer is one that nobody has written down here.

    Source: Muon: Keller Jordan, "Muon: An optimizer for hidden layers" (2024); the scaling, 0.2 sqrt(max(rows, columns)), is that
    of Muon is Scalable for LLM Training, arXiv:2502.16982, section 2.2.
    """
    match optim:
        case MuonConfig():
            hidden, rest = [], []
            for name, parameter in model.named_parameters():
                (hidden if name.startswith("blocks.") and parameter.ndim == 2 else rest).append(parameter)
            muon = StackedMuon(
                hidden,
                dtype=torch.float32 if precision is Precision.fp32 else torch.bfloat16,
                state_dtype=_DTYPES[optim.state_dtype],
                compiles=compiles,
                lr=optim.max_lr,
                weight_decay=optim.weight_decay,
                momentum=optim.momentum,
                nesterov=True,
                adjust_lr_fn="match_rms_adamw",
            )
            return Optimizers({"muon": muon, "adamw": _adamw(rest, optim, optim.adamw_max_lr, device_type, compiles)})
        case AdamWConfig():
            return Optimizers({"adamw": _adamw(list(model.parameters()), optim, optim.max_lr, device_type, compiles)})
    rule = "is no case of build_optimizer in llama_lab/training/optim.py, so nothing says how it steps; add one there"
    raise ConfigError([(type(optim).__name__, rule)])


def _adamw(parameters: list[Tensor], optim: AdamWConfig, max_lr: float, device_type: str, compiles: bool) -> AdamW | NarrowAdamW:
    """AdamW with decay on what has two or more dimensions."""
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": max_lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if optim.state_dtype is not StateDtype.fp32:
        return NarrowAdamW(groups, dtype=_DTYPES[optim.state_dtype], compiles=compiles, **settings)
    return AdamW(groups, fused=device_type in ("cuda", "cpu", "mps"), **settings)
