"""Counted parameters and FLOPs against the model itself."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_lab.model.count import ffn_dim, flops_per_token, parameters
from llama_lab.model.llama import Llama


def test_the_seeds_1b_has_its_parameters(shape):
    config = shape(dim=2048, n_layers=24, n_heads=32, ffn_dim=None, multiple_of=256)
    assert ffn_dim(config) == 5632
    assert parameters(config, 8192) == 1_266_780_160
    with torch.device("meta"):
        model = Llama(config, vocab_size=8192, max_seq_len=2048)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_266_780_160


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 1}, {"tie_embeddings": True}, {"qk_norm": True, "n_kv_heads": 2}, {"dim": 40, "ffn_dim": None}],
    ids=["mha", "gqa", "tied", "qk_norm", "derived_width"],
)
def test_counted_parameters_are_those_of_the_model(llama, changes):
    model = llama(**changes)
    assert parameters(model.config, model.vocab_size) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_counted_flops_are_those_of_torch(llama, tied):
    model = llama(dim=128, n_heads=4, ffn_dim=320, tie_embeddings=tied, vocab_size=257)
    tokens = torch.zeros(2, 24, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counted = flops_per_token(model.config, 257, 24) * tokens.numel()
    # The difference are the gains of the norms, which 6 N counts although they are no matrix products.
    assert counted == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_counting_needs_no_torch():
    command = "import sys, llama_lab.model.count, llama_lab.training.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
