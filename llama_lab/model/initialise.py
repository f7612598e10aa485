"""The weights that training starts from."""

import math

import torch
from torch import Tensor

from llama_lab.config.schema import ModelConfig

STD = 0.02
"""Standard deviation of matrices unless `std_of` says otherwise."""


def std_of(name: str, config: ModelConfig) -> float:
    """Standard deviation that a matrix is drawn with.

    Projections back into the residual stream are smaller by sqrt(2 n_layers), so that the sum of all branches keeps the size of
    one; or zero if so configured. The output projection is bounded so that logits start within a standard deviation of 0.32 and
    the first loss within 0.06 nats of ln(vocabulary), at any width. A tied embedding meets itself in the output, where a token's
    own logit starts near dim x std: bounded to 2, or wide models would begin certain that each token repeats.

    Source: the residual scaling is that of Language Models are Unsupervised Multitask Learners (GPT-2), section 2.3.
    """
    if name.endswith((".o.weight", ".down.weight")):
        return 0.0 if config.zero_init_outputs else STD / math.sqrt(2 * config.n_layers)
    if name == "output.weight":
        return min(STD, 0.32 / math.sqrt(config.dim))
    if name == "embedding.weight" and config.tie_embeddings:
        return min(STD, 2.0 / config.dim)
    return STD


@torch.no_grad()
def initialise(named_parameters: list[tuple[str, Tensor]], config: ModelConfig, generator: torch.Generator) -> None:
    """Draw matrices from a normal, set gains to one. Draws happen on the CPU in float32, in the order given, so the weights
    depend on the generator's seed alone, not on device or number of processes."""
    for name, parameter in named_parameters:
        if parameter.ndim < 2:
            parameter.fill_(1.0)
        else:
            drawn = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
            parameter.copy_(drawn.normal_(0.0, std_of(name, config), generator=generator))
