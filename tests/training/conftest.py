"""A run small enough to be trained many times, on text of the test's own."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from llama_lab import compose
from llama_lab.config.schema import RunConfig
from llama_lab.training.metrics import read_rows
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.saving.checkpoint import load_weights
from llama_lab.training.saving.manifest import list_checkpoints

VOLATILE = ("seconds", "speed/", "memory/")
"""What depends on the machine and the moment, not on the science; a resumed run equals an unbroken one in all other keys."""
WORDS = [
    "the",
    "a",
    "model",
    "learns",
    "reads",
    "text",
    "loss",
    "token",
    "batch",
    "gradient",
    "slowly",
    "again",
    "because",
    "never",
]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of very different lengths."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    documents = [" ".join(draw.choices(WORDS, k=draw.randint(3, 120))) + "." for _ in range(120)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


@pytest.fixture
def tiny(text: Path):
    """Compose a run of 20 updates of 512 tokens; further overrides come last."""

    def make(*overrides: str) -> RunConfig:
        return compose([*tiny_overrides(text), *overrides])

    return make


def tiny_overrides(text: Path) -> list[str]:
    """What makes a run tiny, as it would be typed."""
    science = "precision=fp32 tokenizer=bytes model.dim=32 model.n_layers=2 model.n_heads=2 model.multiple_of=32"
    budget = "training_tokens=10240 data.max_seq_len=32 data.tokens_per_update=512"
    schedule = "schedule.warmup_updates=2 schedule.cooldown_fraction=0.5"
    watching = "log.every_updates=3 eval.every_updates=5 eval.max_tokens=500"
    watching += " sample.first_tokens=2048 sample.new_tokens=8 sample.prompt_sets=[]"
    saving = "checkpoint.every_tokens=2048 checkpoint.keep=10"
    words = f"name=tiny data=text {science} {budget} {schedule} {watching} {saving} hardware=cpu wandb=null"
    return [*words.split(), f"data.path={text}"]


def final_weights(folder: Path):
    """The weights of a run's newest checkpoint, by name."""
    return load_weights(list_checkpoints(folder / "checkpoints")[-1])


def rewind(folder: Path, update: int) -> None:
    """Make a run's folder that of a run killed before a later checkpoint was complete; its later rows are still there."""
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        if checkpoint.update > update:
            shutil.rmtree(checkpoint.path)
    RunFolder(folder).write_summary(status="running")


def steady(folder: Path, name: str = "metrics.jsonl"):
    """The rows of a run without what depends on the machine and the moment."""
    return [{key: value for key, value in row.items() if not key.startswith(VOLATILE)} for row in read_rows(folder / name)]


def assert_same_run(first: Path, second: Path):
    """Bitwise equal weights, equal rows and samples."""
    expected, found = final_weights(first), final_weights(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert steady(first) == steady(second) != []
    assert steady(first, "samples.jsonl") == steady(second, "samples.jsonl")
    assert read_rows(first / "batches.jsonl") == read_rows(second / "batches.jsonl") != []
