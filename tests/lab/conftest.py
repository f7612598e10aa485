"""The tiny run of the training tests, for what works on runs; and folders of such runs that nobody trained."""

from functools import partial
from pathlib import Path

import pytest

from llama_lab import compose
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import RunConfig

from ..training.conftest import text, tiny, tiny_overrides
from .written_runs import Make, write_run

__all__ = ["text", "tiny"]


@pytest.fixture(scope="session")
def untrained(text: Path) -> RunConfig:
    """The tiny run, resolved."""
    return resolve(compose([*tiny_overrides(text), "eval.max_tokens=null"]))


@pytest.fixture
def make(untrained: RunConfig, outputs: Path) -> Make:
    """Write the folder of a finished tiny run with the loss that it is to have."""
    return partial(write_run, untrained)


@pytest.fixture(scope="session")
def shaped_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each shape of model; they are read, never changed."""
    from .exports import make_runs

    return make_runs(text, tmp_path_factory.mktemp("shaped"))
