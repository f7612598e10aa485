"""Training time: in all and between two rows, on a clock of the test's own; and who is told that looking goes on."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_lab.config.resolve import resolve
from llama_lab.data.prepare import prepare
from llama_lab.training import clock as clocks
from llama_lab.training.clock import Clock
from llama_lab.training.loop import build
from llama_lab.training.observing import Observers, observe
from llama_lab.training.processes.stop import Stop, Stopped
from llama_lab.training.processes.watchdog import Watchdog
from llama_lab.training.processes.worker import Place, Worker

ALONE = Worker(Place(), torch.device("cpu"))


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let so many seconds pass."""
    now = [1000.0]

    def passed(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return passed


def test_a_lap_leaves_out_what_happens_beside_training(wait):
    clock = Clock(7.0, ALONE)
    assert clock.seconds() == 7
    clock.count(512)
    wait(1)
    with clock.excluded():
        wait(5)
    clock.count(512)
    wait(3)
    assert clock.lap(1.0) == (256, 0.25)
    assert clock.seconds() == 16
    clock.count(512)
    wait(2)
    assert clock.lap(2.0) == (256, 0.5), "nothing of the lap before"


class Noted(Watchdog):
    """Notes where the loop was whenever it said that it moves."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.alive_at: list[str] = []

    def alive(self) -> None:
        self.alive_at.append(self.place)
        super().alive()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_looking_shows_that_it_moves_and_takes_no_training_time(tiny, tmp_path, wait, is_stopped):
    run = resolve(tiny())
    data = prepare(run.data, run.tokenizer, lambda text: None)
    model, _ = build(run, data, ALONE)
    clock, watchdog, stop = Clock(0.0, ALONE), Noted(rank=0, seconds=None, log=tmp_path / "train.log"), Stop()

    def evaluate(*arguments: Any) -> Any:
        *_, stopped = arguments
        assert not stopped()
        wait(100)
        if is_stopped:
            stop.request()
            assert stopped()
            raise Stopped
        return SimpleNamespace(loss_nats=1.0, bits_per_byte=1.0, sources={})

    def nothing(*arguments: Any) -> Any:
        raise AssertionError("not due")

    clock.count(512)
    wait(2)
    looked = observe(run, model, data, Observers(evaluate, nothing, nothing), ALONE, None, clock, 5, watchdog, stop)
    assert looked is not is_stopped
    assert watchdog.alive_at == ["the validation after update 5"] * (2 if is_stopped else 1)
    assert clock.lap(0.0) == (256, 0.0)
