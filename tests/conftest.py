"""What every test stands on: folders of its own, no tracker that calls home, and the real command line in a process."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Models of tests are too small to share between threads, and OpenMP threads that spin while another process computes slow both down
# many times over. Read by torch, in this process and in those that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none. torch is imported only if something asks for one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for the whole session, so that the documentation corpus is prepared once; never the user's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LLAMA_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("WANDB_MODE", "offline")
    # A test that runs under torchrun or in a job of a cluster would otherwise be taken for a worker.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        patch.delenv(name, raising=False)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that runs of this test are written to."""
    folder = tmp_path / "outputs"
    monkeypatch.setenv("LLAMA_LAB_OUTPUTS", str(folder))
    return folder


@pytest.fixture
def cpu_seconds() -> Callable[[], float]:
    """Seconds that processors have spent on processes of this test that have ended.

    What a command costs, also on a machine that does other things meanwhile; it says nothing on Windows.
    """
    before = os.times()

    def spent() -> float:
        now = os.times()
        return now.children_user + now.children_system - before.children_user - before.children_system

    return spent


@pytest.fixture
def llama_lab(tmp_path: Path) -> Cli:
    """Run `llama-lab …` in a process, in an empty folder, and return what it said."""

    def run(*words: str, timeout: float = 170, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "llama_lab", *words],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
            cwd=tmp_path,
            env=os.environ | environment,
        )

    return run
