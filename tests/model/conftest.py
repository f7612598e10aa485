"""Small models with weights that matter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama_lab.config.schema import ModelConfig
from llama_lab.model.llama import Llama

SMALL = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": None,
    "ffn_dim": 48,
    "multiple_of": 8,
    "rope_theta": 10_000.0,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
    "qk_norm": False,
    "zero_init_outputs": False,
    "dropout": 0.0,
}


@pytest.fixture
def shape() -> Callable[..., ModelConfig]:
    """A small config, with the given fields changed."""
    return lambda **changes: ModelConfig(**(SMALL | changes))


@pytest.fixture
def llama(shape: Callable[..., ModelConfig]) -> Callable[..., Llama]:
    """A small model whose weights and gains are all far from what would hide a mistake: attention is uneven, gains differ."""

    def build(*, vocab_size: int = 61, max_seq_len: int = 24, **changes: Any) -> Llama:
        model = Llama(shape(**changes), vocab_size=vocab_size, max_seq_len=max_seq_len)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * 0.18 if parameter.ndim > 1 else 1 + drawn * 0.2)
        return model

    return build
