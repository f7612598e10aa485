"""From a config to a trained run: data, folder, processes, and what is said before and after.

The parent composes and prepares once; workers are started with the result. One process trains right here. Several on one
machine are spawned here. Under torchrun the processes exist already, and the first of them decides for all.
"""

import contextlib
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import run_folder
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import RunConfig, Window
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.training.retention import check_disk, need
from llama_lab.training.run_folder import RunFolder, describe_origin, open_run, relative, shorter_run

STOP_POLL_SECONDS = 0.2
# A worker that does not end so long after another failed is stuck waiting for it.
GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What became of a run.

    Attributes:
        folder: where it lies.
        status: "finished", "preempted", or "already finished" if there was nothing left to do.
        updates, tokens: done so far.
        summary: last and best values by metric key, as in summary.json.
    """

    folder: Path
    status: str
    updates: int
    tokens: int
    summary: dict[str, Any]


def launch(
    run: RunConfig,
    load_observers: Callable[[], Any],
    *,
    handle_signals: bool = False,
    command: list[str] | None = None,
    extra_slug: str | None = None,
) -> TrainResult:
    """Train a run to its end, or go on with it where it stands.

    Args:
        run: composed and valid.
        load_observers: gives the `loop.Observers`; called in every worker, so that it may import torch, and pickled by name.
        handle_signals: whether SIGTERM, SIGINT and SIGUSR1 end the run politely. False leaves the process's handlers alone.
        command: what was typed, kept in meta.json.
        extra_slug: what a sweep adds to the folder's name.

    Raises:
        ConfigError: this machine, the data or an existing folder do not allow the run.
        errors.Diverged: the loss is no longer finite.
        RuntimeError: a worker process failed; its traceback is in the text.
    """
    run = resolve(run)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _follow(run, load_observers, handle_signals, command, extra_slug)
    done = RunFolder(run_folder(run, extra_slug))
    if done.finished and not run.fresh:
        return _already(done, _say)
    if (shorter := shorter_run(run, done.path)) is not None:
        _say(shorter)
    data = _prepare(run, _say)
    with open_run(run, run_folder(run, extra_slug), origin=_origin(run, data, command)) as folder:
        if folder.finished:
            return _already(folder, _say)
        data.tokenizer.save(folder.path / "tokenizer.json")
        with _recording(folder):
            start = _alone if run.hardware.processes == 1 else _spawn
            status = start(run, folder, data, load_observers, handle_signals)
        return _result(folder, status)


def _alone(run: RunConfig, folder: RunFolder, data: PreparedData, load_observers: Callable[[], Any], handle_signals: bool) -> str:
    """Train in this very process."""
    from llama_lab.training.stop import Stop, stop_on_signals
    from llama_lab.training.worker import Place, join

    stop = Stop()
    with stop_on_signals(stop) if handle_signals else contextlib.nullcontext(), join(run.hardware, Place()) as worker:
        return _work(run, folder, data, worker, load_observers, stop)


def _work(run: RunConfig, folder: RunFolder, data: PreparedData, worker: Any, load_observers: Callable[[], Any], stop: Any) -> str:
    """Train as one worker, and close what was opened, whatever happens."""
    from llama_lab.training.announce import say_hello, say_results
    from llama_lab.training.console import Console
    from llama_lab.training.errors import SaveFailed
    from llama_lab.training.loop import train_run
    from llama_lab.training.plots import draw_plots
    from llama_lab.training.tracker import Tracker, start_tracker

    log = folder.path / "train.log" if worker.is_main else None
    with Console(log, total=run.updates, enabled=worker.is_main) as console:
        tracker, exit_code = Tracker(), 1
        try:
            if worker.is_main:
                say_hello(run, folder, data, console)
                tracker = start_tracker(run, folder, console.say)
            status = train_run(run, folder, data, worker, load_observers(), stop, console, tracker)
            exit_code = 0 if status == "finished" else 75
        except BaseException as error:
            console.note(traceback.format_exc())
            if worker.is_main and isinstance(error, SaveFailed):
                # A stop was asked for, perhaps; a parent that only sees a worker end would take it for a whole one.
                folder.write_summary(status="failed")
            raise
        finally:
            tracker.finish(exit_code)
        if worker.is_main:
            folder.write_summary(status=status)
            try:
                draw_plots(folder.path, vocab_size=data.tokenizer.vocab_size)
                say_results(run, folder, data, status, tracker, console)
            except Exception:
                # The run is done and saved; a missing font or a closed terminal must not make it a failed one.
                console.note(traceback.format_exc())
                console.say("The pictures or closing words could not be made; train.log says why")
    return status


def _spawn(run: RunConfig, folder: RunFolder, data: PreparedData, load_observers: Callable[[], Any], handle_signals: bool) -> str:
    """Start one process a rank on this machine, forward a stop to them, and wait."""
    import torch.multiprocessing as mp

    from llama_lab.training.stop import Stop, stop_on_signals

    stop, asked = Stop(), mp.get_context("spawn").Event()
    with (
        tempfile.TemporaryDirectory(prefix="llama_lab-") as meeting,
        stop_on_signals(stop) if handle_signals else contextlib.nullcontext(),
    ):
        # A file to meet at needs no port, so two runs on one machine cannot take each other's.
        rendezvous = f"file://{meeting}/store"
        arguments = (run, folder.path, data, rendezvous, load_observers, asked if handle_signals else None)
        workers: Any = mp.spawn(_spawned, args=arguments, nprocs=run.hardware.processes or 1, join=False)
        try:
            while not workers.join(timeout=STOP_POLL_SECONDS, grace_period=GRACE_SECONDS):
                if stop.requested():
                    asked.set()
        except (mp.ProcessExitedException, mp.ProcessRaisedException):
            # A signal to the whole group can end a worker that is still starting; nothing is lost then.
            if not stop.requested() or folder.summary()["status"] == "failed":
                raise
        finally:
            for process in workers.processes:
                if process is not None and process.is_alive():
                    process.kill()
    if stop.requested() and folder.summary()["status"] == "running":
        folder.write_summary(status="preempted")
    return folder.summary()["status"]


def _spawned(
    rank: int, run: RunConfig, path: Path, data: PreparedData, rendezvous: str, load_observers: Callable[[], Any], asked: Any
) -> None:
    """What a spawned process runs. Its parent alone listens to signals, and passes a stop on through `asked`."""
    from llama_lab.training.stop import Stop, stop_on_signals
    from llama_lab.training.worker import Place, join

    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    stop = Stop(asked)
    signals = contextlib.nullcontext() if asked is None else stop_on_signals(stop, ignore=True)
    with signals, join(run.hardware, Place(rank, run.hardware.processes or 1, rank, rendezvous)) as worker:
        _work(run, RunFolder(path), data, worker, load_observers, stop)


def _end_with_parent() -> None:
    """End this process when its parent is gone: the run's lock went with it, and another start may write into the folder."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _prepare(run: RunConfig, say: Callable[[str], None]) -> PreparedData:
    """The run's data, if it is enough for one window, and holds validation tokens where the run validates."""
    data = prepare(run.data, run.tokenizer, say)
    problems = []
    for source in data.sources:
        if run.data.window is Window.contiguous and source.train.tokens <= run.data.max_seq_len:
            where = f" in {source.name}" if len(data.sources) > 1 else ""
            rule = f"is more than the {source.train.tokens - 1:,} tokens there are to predict{where}; "
            problems.append((f"data.max_seq_len={run.data.max_seq_len}", rule + "give more text or a shorter window"))
    if run.eval is not None and not data.val_tokens:
        problems.append(("eval", "has nothing to validate on: the data holds no validation tokens; eval=null trains without"))
    if problems:
        raise ConfigError(problems)
    check_disk(need(run, data.tokenizer.vocab_size), run_folder(run) / "checkpoints")
    return data


def _follow(
    run: RunConfig, load_observers: Callable[[], Any], handle_signals: bool, command: list[str] | None, extra_slug: str | None
) -> TrainResult:
    """Be one of the processes that torchrun started: the first holds the folder, the others do as it says."""
    import torch.distributed as dist

    from llama_lab.training.stop import Stop, stop_on_signals
    from llama_lab.training.worker import Place, join

    place = Place.from_environment()
    say = _say if place.rank == 0 else _silent
    # The cache's lock lets one process prepare; the others wait for it and find the work done.
    data = _prepare(run, say)
    folder, stop = RunFolder(run_folder(run, extra_slug)), Stop()
    signals = stop_on_signals(stop) if handle_signals else contextlib.nullcontext()
    with contextlib.ExitStack() as held, signals, join(run.hardware, place) as worker:
        decision, refusal = [""], None
        if worker.is_main:
            try:
                held.enter_context(open_run(run, folder.path, origin=_origin(run, data, command)))
                decision = ["finished" if folder.finished else "go"]
            except Exception as error:
                decision, refusal = ["refused"], error
        dist.broadcast_object_list(decision)
        if refusal is not None:
            raise refusal
        if decision[0] == "refused":
            sys.exit(2)  # rank 0 says why, once
        if decision[0] == "finished":
            return _already(folder, say)
        if worker.is_main:
            data.tokenizer.save(folder.path / "tokenizer.json")
        with _recording(folder) if worker.is_main else contextlib.nullcontext():
            status = _work(run, folder, data, worker, load_observers, stop)
        return _result(folder, status)


@contextlib.contextmanager
def _recording(folder: RunFolder) -> Iterator[None]:
    """Write into summary.json that the run is running, and that it failed if it does."""
    folder.write_summary(status="running", error=None)
    try:
        yield
    except BaseException as error:
        folder.write_summary(status="failed", error=f"{type(error).__name__}: {error}"[:2000])
        raise


def _already(folder: RunFolder, say: Callable[[str], None]) -> TrainResult:
    result = _result(folder, "already finished")
    values = ", ".join(
        f"{key} {value:.4f}" for key in ("val/loss", "val/bits_per_byte") if (value := result.summary.get(key)) is not None
    )
    say(f"Already finished: {relative(folder.path)} ({result.updates} updates{', ' + values if values else ''})")
    say("  fresh=true trains it anew; another seed, training_tokens or any other scientific value is a run of its own")
    return result


def _result(folder: RunFolder, status: str) -> TrainResult:
    summary = folder.summary()
    return TrainResult(folder.path, status, summary.get("update", 0), summary.get("tokens", 0), summary)


def _origin(run: RunConfig, data: PreparedData, command: list[str] | None) -> dict[str, Any]:
    return describe_origin(run, command=command, data={"data": data.fingerprint, "tokenizer": data.tokenizer.hash})


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    """Say nothing."""
