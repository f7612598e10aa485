"""Updates and validations of a run made again, from its config and data, without touching its folder.

    first weights or a checkpoint -> the same updates as in `train_run`, in as many processes -> loss, norms and weights of each
    checkpoints -> the same validation as in `observe`, in as many processes -> the values of each one's row

Nothing is saved or sampled, and a bad update is left out however many there are.
"""

import pickle
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama_lab.config.schema import RunConfig
from llama_lab.data.prepare import PreparedData
from llama_lab.data.stream import training_stream
from llama_lab.training.feed import Feed
from llama_lab.training.loop import build
from llama_lab.training.metrics import validation_row
from llama_lab.training.observing import parts_of
from llama_lab.training.processes.board import Board
from llama_lab.training.processes.ranks import run_ranks
from llama_lab.training.processes.stop import Stop
from llama_lab.training.processes.worker import Place, Worker, join
from llama_lab.training.saving.checkpoint import load_weights
from llama_lab.training.saving.manifest import Checkpoint, DamagedCheckpoint
from llama_lab.training.state import State
from llama_lab.training.update import Updater


@dataclass(frozen=True, slots=True)
class Compared:
    """Weights that were come to again, beside those of a checkpoint.

    Attributes:
        update: that both are of.
        tensors: how many there are.
        differences: of those that are not equal bit for bit, in the order of their names, the norm of the difference as a share of
            the checkpoint's norm.
    """

    update: int
    tensors: int
    differences: dict[str, float]


@dataclass(frozen=True, slots=True)
class Replayed:
    """An update that was made again, over all processes.

    Attributes:
        loss: of this update alone, in nats a token.
        row_loss: the mean since the last row, where a row was asked for.
        norm: of the gradient, before clipping.
        lr: of the group that `optim.max_lr` speaks of.
        norms: of each parameter's gradient.
        hash: of what it was fed.
        weights: after it, beside those of a checkpoint, where there is one.
    """

    update: int
    loss: float
    row_loss: float | None
    norm: float
    lr: float
    norms: dict[str, float]
    hash: str
    weights: Compared | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be made again.

    Attributes:
        run: resolved for this machine.
        begin: where to start; None: at the first weights.
        last: number of the last update.
        rows: numbers of the updates that the run has a row for.
        checkpoints: whose weights are compared on the way.
    """

    run: RunConfig
    data: PreparedData
    begin: Checkpoint | None
    last: int
    rows: Collection[int] = ()
    checkpoints: Sequence[Checkpoint] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Validations:
    """Which validations are to be made again.

    Attributes:
        run: resolved for this machine.
        evaluate: as `Observers` has it; of a module's own, so that other processes find it.
    """

    run: RunConfig
    data: PreparedData
    checkpoints: Sequence[Checkpoint]
    evaluate: Callable[..., Any]


def replay(asked: Request) -> list[Replayed]:
    """Make the updates after `begin` to `last` again, in this process or in as many as the run says.

    Raises:
        DamagedCheckpoint: `begin` is one.
        errors.RunFailed: a process failed.
    """
    return _in_processes(_work, asked, asked.run)


def validate_again(asked: Validations) -> list[dict[str, float]]:
    """The values of each checkpoint's validation, by metric key.

    Raises:
        DamagedCheckpoint: of one of them.
        errors.RunFailed: a process failed.
    """
    return _in_processes(_validate, asked, asked.run)


def _in_processes(work: Callable[[Any, Worker], Any], asked: Any, run: RunConfig) -> Any:
    """What `work` finds in this process, or in the first of as many as the run says."""
    processes = run.hardware.processes or 1
    if processes == 1:
        with join(run.hardware, Place()) as worker:
            return work(asked, worker)
    with tempfile.TemporaryDirectory(prefix="llama_lab-") as folder:
        answer = Path(folder) / "answer"
        board = Board(Path(folder) / "ranks")
        run_ranks(_spawned, (work, asked, run, answer), processes=processes, board=board, stop=Stop(), asked=None)
        return pickle.loads(answer.read_bytes())


def _spawned(rank: int, work: Callable[[Any, Worker], Any], asked: Any, run: RunConfig, answer: Path) -> None:
    """What each of several processes runs; the first writes what was found."""
    place = Place(rank, run.hardware.processes or 1, rank, f"file://{answer.parent}/store")
    with join(run.hardware, place) as worker:
        found = work(asked, worker)
        if worker.is_main:
            answer.write_bytes(pickle.dumps(found))


def _validate(asked: Validations, worker: Worker) -> list[dict[str, float]]:
    model, _ = build(asked.run, asked.data, worker)
    found = []
    for checkpoint in asked.checkpoints:
        model.load_state_dict(load_weights(checkpoint))
        # As in training: a GPU computes with copies of the weights, which are made here.
        with Updater(model, asked.run, worker):
            result = asked.evaluate(model, asked.data, asked.run, worker, lambda: False)
        found.append(validation_row(*parts_of(result)))
    return found


def _work(asked: Request, worker: Worker) -> list[Replayed]:
    run, found = asked.run, []
    model, optimizer = build(run, asked.data, worker)
    state = State.at_start(worker)
    if asked.begin is not None:
        state.restore(asked.begin, model, optimizer, worker)
    names = [name for name, _ in model.named_parameters()]
    checkpoints = {checkpoint.update: checkpoint for checkpoint in asked.checkpoints}
    stream = training_stream(run, asked.data)
    first = state.update + 1
    with Updater(model, run, worker) as updater, Feed(stream, run, worker, first_update=first, last_update=asked.last) as feed:
        for update in range(first, asked.last + 1):
            gradients = updater.gradients(feed, update)
            factor = updater.step(optimizer, update, unless=gradients.is_bad)
            state.count(update, gradients)
            own = worker.total(torch.stack((gradients.own.loss_sum, gradients.own.predicted))).tolist()
            _, fed = worker.settle(False, gradients.own.hash)
            row_loss = None
            if update in asked.rows:
                loss_sum, predicted = worker.total(torch.stack((state.loss_sum, state.predicted))).tolist()
                row_loss = loss_sum / predicted if predicted else float("nan")
                state.loss_sum.zero_()
                state.predicted.zero_()
            found.append(
                Replayed(
                    update=update,
                    loss=own[0] / own[1],
                    row_loss=row_loss,
                    norm=float(gradients.norm),
                    lr=factor * run.optim.max_lr,
                    norms=dict(zip(names, gradients.norms.tolist(), strict=True)),
                    hash=f"{fed:016x}",
                    weights=_compared(model.state_dict(), checkpoints.get(update)) if worker.is_main else None,
                )
            )
    return found


def _compared(weights: dict[str, torch.Tensor], checkpoint: Checkpoint | None) -> Compared | None:
    """Weights beside a checkpoint's; None if there is none, or none that can be read."""
    if checkpoint is None:
        return None
    try:
        saved = load_weights(checkpoint)
    except (DamagedCheckpoint, FileNotFoundError):  # said where checksums are compared, or removed in the meantime
        return None
    differences = {}
    for name, expected in sorted(saved.items()):
        found = weights[name].to(expected.device)
        if not torch.equal(found, expected):
            distance = torch.linalg.vector_norm(found.double() - expected.double())
            differences[name] = float(distance / torch.linalg.vector_norm(expected.double()))
    return Compared(checkpoint.update, len(saved), differences)
