"""Small models with weights that matter, and a small run that was trained."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama_lab import compose, train
from llama_lab.config.schema import ModelConfig
from llama_lab.model.llama import Llama

CONTEXT, VOCABULARY = 12, 31
WORDS = [
    "the",
    "a",
    "model",
    "learns",
    "reads",
    "text",
    "loss",
    "token",
    "slowly",
    "again",
    "because",
    "never",
    "über",
    "naïve",
    "🙂",
]


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


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of very different lengths."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    documents = [" ".join(draw.choices(WORDS, k=draw.randint(3, 80))) + "." for _ in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


def tiny_overrides(text: Path) -> list[str]:
    """What makes a run tiny: 8 updates of 256 tokens, checkpoints after 4 and 8."""
    science = "precision=fp32 tokenizer=bytes model.dim=32 model.n_layers=2 model.n_heads=2 model.multiple_of=32"
    budget = "training_tokens=2048 data.max_seq_len=64 data.tokens_per_update=256 schedule=constant schedule.warmup_updates=1"
    watching = "eval.every_updates=4 sample=null log.every_updates=2 checkpoint.every_tokens=1024 checkpoint.keep=9"
    return [*f"name=tiny data=text {science} {budget} {watching} hardware=cpu wandb=null".split(), f"data.path={text}"]


@pytest.fixture(scope="session")
def run_folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trained run, which tests read and leave as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_LAB_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        folder = train(compose(tiny_overrides(text_file))).folder
    yield folder
