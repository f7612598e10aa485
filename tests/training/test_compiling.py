"""What is compiled is kept, and made once for runs of one shape that start together."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_lab.config.compose import compose
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import Compile, RunConfig
from llama_lab.data.cache import compiled_root, run_cache_command
from llama_lab.training import muon as muon_module
from llama_lab.training.compiled_files import VARIABLES
from llama_lab.training.compiling import Compiling
from llama_lab.training.muon import StackedMuon
from llama_lab.training.processes.worker import Place, Worker, join

WORKER = Worker(Place(), torch.device("cpu"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "cache"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = resolve(compose(["hardware=cpu", "precision=fp32"]))
    return replace(found, hardware=replace(found.hardware, compile=Compile.always))


def test_a_run_that_compiles_keeps_what_it_makes_in_the_cache_and_leaves_the_environment(run: RunConfig, capsys):
    with join(run.hardware, Place()), Compiling(run, 300, WORKER) as compiling:
        compiling.begin()
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == compiled_root() / "inductor"
        (compiled_root() / "inductor").mkdir(parents=True, exist_ok=True)
        (compiled_root() / "inductor" / "kernel.so").write_bytes(b"x" * 5_000)
        compiling.end()
    assert not any(name in os.environ for name in VARIABLES)
    assert run_cache_command(["list"]) == 0
    assert "compiled models" in capsys.readouterr().out
    assert run_cache_command(["clean", "compiled"]) == 0
    assert not compiled_root().exists()


def test_a_folder_that_was_chosen_stays_chosen(run: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    with join(run.hardware, Place()):
        assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
        assert "TORCHINDUCTOR_CACHE_DIR" in os.environ
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_a_folder_that_torch_chose_is_nobodys_choice(run: RunConfig):
    """As in a process that has compiled something before: torch writes its folder into the environment."""
    torch.compile(torch.neg)
    chosen = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    for _ in range(2):
        with join(run.hardware, Place()):
            torch.compile(torch.neg)
            assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == compiled_root() / "inductor"
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == chosen


def test_one_process_may_train_any_number_of_shapes_and_rates(run: RunConfig):
    """Without code being made, which is not what a process is limited in."""
    limit = torch._dynamo.config.recompile_limit
    for model in range(4):
        with join(run.hardware, Place()):
            # More shapes than torch lets one function be compiled for.
            matrices = [torch.ones(4 + model, 3 + shape, requires_grad=True) for shape in range(limit + 2)]
            muon = StackedMuon(matrices, dtype=torch.float32, compiles=True, adjust_lr_fn="match_rms_adamw")
            muon._move = torch.compile(muon_module._move, dynamic=False, fullgraph=True, backend="eager")
            for step in range(12):
                muon.param_groups[0]["lr"] = 0.1 / (1 + step)
                for matrix in matrices:
                    matrix.grad = torch.ones_like(matrix)
                muon.step()
    assert torch._dynamo.config.recompile_limit == limit


def test_a_run_without_a_compiler_touches_nothing(run: RunConfig):
    plain = replace(run, hardware=replace(run.hardware, compile=Compile.never))
    with join(plain.hardware, Place()), Compiling(plain, 300, WORKER) as compiling:
        compiling.begin()
        assert not any(name in os.environ for name in VARIABLES)
        compiling.end()
    assert not compiled_root().exists()


class Other:
    """A second run of a shape, in a thread, and what it says."""

    def __init__(self, run: RunConfig, vocab_size: int = 300) -> None:
        self.said: list[str] = []
        self.waits, self.compiles = threading.Event(), threading.Event()
        self._run, self._vocab_size = run, vocab_size
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _say(self, text: str) -> None:
        self.said.append(text)
        self.waits.set()

    def _work(self) -> None:
        with Compiling(self._run, self._vocab_size, WORKER, say=self._say) as compiling:
            compiling.begin()
            self.compiles.set()
            compiling.end()


def test_a_second_run_of_the_shape_waits_until_the_first_has_compiled(run: RunConfig):
    with Compiling(run, 300, WORKER) as first:
        first.begin()
        another_shape = Other(run, vocab_size=301)
        assert another_shape.compiles.wait(30)
        second = Other(run)
        assert second.waits.wait(30)
        assert not second.compiles.is_set()
        first.end()
        assert second.compiles.wait(30)
        assert second.said == ["Another run compiles a model of this shape; waiting for it"]
        # From now on there is something to read, and nobody waits.
        third = Other(run)
        assert third.compiles.wait(30)
        assert third.said == []
    for other in (another_shape, second, third):
        other.thread.join()


def test_a_run_that_fails_while_it_compiles_lets_the_next_one_try(run: RunConfig):
    with pytest.raises(RuntimeError, match="no compiler"), Compiling(run, 300, WORKER) as first:
        first.begin()
        second = Other(run)
        assert second.waits.wait(30)
        raise RuntimeError("no compiler")
    assert second.compiles.wait(30)
    second.thread.join()


def test_the_other_processes_of_a_run_wait_for_nobody(run: RunConfig):
    with Compiling(run, 300, WORKER) as first:
        first.begin()
        with Compiling(run, 300, Worker(Place(rank=1, world_size=2), torch.device("cpu"))) as other:
            other.begin()
            other.end()
        first.end()
