"""Small models with weights that matter."""

import pytest
import torch

from llama_lab.config.schema import ModelConfig
from llama_lab.model.llama import Llama

CONTEXT, VOCABULARY = 12, 31


def small_model(seed: int, *, context: int = CONTEXT, vocabulary: int = VOCABULARY, **changes: object) -> Llama:
    """A small model, sure enough of itself that no two logits are nearly equal. It is in training mode, with dropout."""
    shape = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 24, "multiple_of": 8, "rope_theta": 10_000.0}
    shape |= {"norm_eps": 1e-5, "tie_embeddings": False, "qk_norm": False, "zero_init_outputs": False, "dropout": 0.5}
    model = Llama(ModelConfig(**(shape | changes)), vocab_size=vocabulary, max_seq_len=context)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.ndim > 1 else 1))
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    """The same model for all tests of a file, which leave it as it is."""
    return small_model(13)
