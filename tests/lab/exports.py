"""Runs that are trained a little, and what others make of them."""

import random
from pathlib import Path

import pytest
import torch

from llama_lab import compose, train
from llama_lab.config.identity import save_config
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import RunConfig
from llama_lab.data.tokenizer import BytesTokenizer
from llama_lab.model.llama import Llama
from llama_lab.training.beginning import save_beginning

from ..training.conftest import tiny_overrides

SHAPES = {
    "mha": ["model.tie_embeddings=false", "tokenizer=bpe", "tokenizer.vocab_size=300"],
    "gqa": ["model.tie_embeddings=false", "model.n_heads=4", "model.n_kv_heads=2", "model.rope_theta=500000.0"],
    "tied": ["model.tie_embeddings=true", "model.n_heads=4", "model.n_kv_heads=1"],
    "stretched": ["model.rope_scaling=llama3", "model.rope_factor=8.0", "model.rope_original_len=12"],
    "normalised": ["model.qk_norm=true"],
}
"""Name -> what is special about a run's model."""
TRAINED = ("mha",)
SPECIAL = ["<EOS>", "<SOS>", "<PAD>", "<UNK>", "<|endoftext|>", "</s>"]
SPACES = ["\r\n", "\n\n", "\t", "   ", " ", "\u00a0", "\u2028", "\ufeff", "\u200b"]
OTHERS = ["😀", "👩\u200d👩\u200d👧", "é", "a\u0301", "\x00", "\x1b", "日本", "the model", "'s", "'LL", "1234567", "Ⅷ", "½"]
PIECES = [*SPECIAL, *SPACES, *OTHERS]


def texts(count: int) -> list[str]:
    """Random texts with emoji, control bytes, odd white space and what looks like special tokens."""
    draw = random.Random(0)

    def letter() -> str:
        low, high = draw.choice([(32, 127), (0, 32), (0x80, 0xD7FF), (0xE000, 0x10FFFF)])
        return chr(draw.randrange(low, high))

    def text() -> str:
        return "".join(draw.choice(PIECES) if draw.random() < 0.7 else letter() for _ in range(draw.randrange(40)))

    return [text() for _ in range(count)]


def make_runs(text: Path, outputs: Path) -> dict[str, Path]:
    """A run of each shape. One is trained; the others have random weights that are far from what would hide a mistake."""
    brief = ["training_tokens=4096", "eval.every_updates=4", "sample=null", "checkpoint.every_tokens=2048"]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_LAB_OUTPUTS", str(outputs))
        for name, shape in SHAPES.items():
            replaced = {word.partition("=")[0] for word in (*brief, *shape)}
            words = [word for word in tiny_overrides(text) if word.partition("=")[0] not in replaced and "sample." not in word]
            run = compose([*words, *brief, *shape, f"name={name}"])
            found[name] = train(run).folder if name in TRAINED else write_run(resolve(run), outputs / name)
    return found


def write_run(run: RunConfig, folder: Path) -> Path:
    """A run's folder with a checkpoint of random weights, and nothing that training writes."""
    tokenizer = BytesTokenizer()
    model = Llama(run.model, vocab_size=tokenizer.vocab_size, max_seq_len=run.data.max_seq_len)
    draw = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(weight.shape, generator=draw) * (0.2 if weight.ndim > 1 else 0.1) + (weight.ndim == 1)
        for name, weight in model.state_dict().items()
    }
    folder.mkdir(parents=True)
    save_beginning(folder / "checkpoints", weights, run, vocab_size=tokenizer.vocab_size, facts={})
    save_config(run, folder / "config.yaml")
    tokenizer.save(folder / "tokenizer.json")
    return folder
