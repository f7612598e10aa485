"""Evaluation: every token once, whatever the batches and the number of processes, and nothing left behind."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from llama_lab.config.schema import ModelConfig, Window
from llama_lab.data.shards import Split, open_split
from llama_lab.data.stream import TokenStream
from llama_lab.data.writer import SplitWriter
from llama_lab.inference.evaluate import evaluate, together
from llama_lab.model.llama import Llama

CONTEXT, EOS, VOCABULARY = 8, 30, 31


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Five documents of uneven length, 3 bytes a token, 61 tokens to predict: no multiple of the context."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    writer = SplitWriter(folder, "val", vocab_size=VOCABULARY, eos_id=EOS)
    numbers = np.random.default_rng(0)
    for length in (9, 1, 24, 16, 6):
        writer.add(numbers.integers(0, EOS, length), 3 * length)
    opened = open_split(folder, {"token_dtype": "uint16", "splits": {"val": writer.close()}}, "val")
    assert opened is not None and opened.tokens == 62
    return opened


@pytest.fixture
def model() -> Llama:
    config = ModelConfig(
        dim=16,
        n_layers=1,
        n_heads=2,
        n_kv_heads=None,
        ffn_dim=24,
        multiple_of=8,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        qk_norm=False,
        zero_init_outputs=False,
        dropout=0.5,
    )
    model = Llama(config, vocab_size=VOCABULARY, max_seq_len=CONTEXT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def stream(split: Split, window: Window = Window.contiguous, max_tokens: int | None = None) -> TokenStream:
    return TokenStream(split, max_seq_len=CONTEXT, window=window, shuffle=False, max_tokens=max_tokens)


def nats_of(model: Llama, ids: np.ndarray, starts: list[int]) -> float:
    """Cross-entropy of all ids but the first, each predicted from its window, which reaches back to the start before it."""
    model.eval()
    total = 0.0
    for start, stop in zip(starts, [*starts[1:], len(ids) - 1], strict=True):
        window = torch.from_numpy(ids[start : stop + 1].astype(np.int64))
        with torch.no_grad():
            total += functional.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    model.train()
    return total


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 50])
def test_every_token_is_predicted_once_for_any_micro_batch(model, split, micro_batch):
    result = evaluate(model, stream(split), micro_batch=micro_batch)
    nats = nats_of(model, split.read(0, 62), list(range(0, 61, CONTEXT)))
    assert (result.tokens, result.text_bytes) == (61, 3 * 56)
    assert result.loss_nats == pytest.approx(nats / 61, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / 61), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * 56), rel=1e-6)


def test_document_windows_predict_the_same_tokens(model, split):
    result = evaluate(model, stream(split, Window.document), micro_batch=3)
    starts = [start for first, end in pairwise(split.document_starts.tolist()) for start in range(first, end, CONTEXT)]
    assert result.tokens == 61
    assert result.loss_nats == pytest.approx(nats_of(model, split.read(0, 62), starts) / 61, rel=1e-6)


def test_a_limit_takes_tokens_and_their_bytes_from_the_start(model, split):
    result = evaluate(model, stream(split, max_tokens=21), micro_batch=2)
    assert result.tokens == 21
    assert result.loss_nats == pytest.approx(nats_of(model, split.read(0, 22), [0, 8, 16]) / 21, rel=1e-6)
    assert result.text_bytes == 3 * (9 + 1 + 9)  # two documents, two EOS, then nine tokens of the third


def test_the_shares_of_the_processes_add_up(model, split, tmp_path):
    whole = evaluate(model, stream(split), micro_batch=2)
    # A group of this process alone, so that each call returns what its rank would have contributed.
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        shares = [evaluate(model, stream(split), micro_batch=2, rank=rank, world_size=3).loss_nats for rank in range(3)]
    finally:
        dist.destroy_process_group()
    assert all(share > 0 for share in shares)
    assert sum(shares) == pytest.approx(whole.loss_nats, rel=1e-6)


def test_sources_together_are_their_tokens_together(model, split):
    long, short = (evaluate(model, stream(split, max_tokens=tokens), micro_batch=4) for tokens in (None, 10))
    whole = together({"long": long, "short": short})
    nats = 61 * long.loss_nats + 10 * short.loss_nats
    assert (whole.tokens, whole.text_bytes) == (71, long.text_bytes + short.text_bytes)
    assert whole.loss_nats == pytest.approx(nats / 71)
    assert whole.bits_per_byte == pytest.approx(nats / math.log(2) / whole.text_bytes)
    assert whole.sources == {"long": long, "short": short}
    # Bytes that only some of the tokens stand for would make too much of the bits of all.
    unknown = together({"long": long, "short": replace(short, text_bytes=0, bits_per_byte=math.inf)})
    assert (unknown.text_bytes, unknown.bits_per_byte) == (0, math.inf)
    assert unknown.loss_nats == whole.loss_nats


def test_nothing_that_training_depends_on_is_touched(model, split):
    global_state = torch.random.get_rng_state()
    evaluate(model, stream(split), micro_batch=4)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(global_state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_hopeless_model_has_an_infinite_perplexity(model, split):
    with torch.no_grad():
        model.output.weight.mul_(1e5)
    result = evaluate(model, stream(split), micro_batch=8)
    assert result.perplexity == math.inf and math.isfinite(result.loss_nats)
