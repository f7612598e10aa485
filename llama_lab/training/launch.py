"""From a config to a trained run: data, folder, processes, and what is said before and after.

The parent composes and prepares once; workers are started with the result. One process trains right here. Several on one
machine are spawned here. Under torchrun the processes exist already, and the first of them decides for all.
"""

import contextlib
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_lab.config.disk import remedy, why
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import run_folder
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import AUTO, RunConfig, Window
from llama_lab.data.cache import in_use
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.training.errors import RankFailed, SaveFailed
from llama_lab.training.foresight.forecast import Forecast, correct_probe, foresee, keep_to_budget
from llama_lab.training.foresight.memory import explained, settle_micro_batch
from llama_lab.training.processes.board import Board, failure_of
from llama_lab.training.processes.ranks import check_script, end_rank, run_ranks
from llama_lab.training.processes.stop import Stop, stop_on_signals, stop_with_parent
from llama_lab.training.processes.watchdog import Watchdog
from llama_lab.training.run_data import MADE_BY, refuse_other_data
from llama_lab.training.run_folder import (
    RunFolder,
    describe_origin,
    extending_command,
    open_run,
    relative,
    restore_config,
    shorter_run,
)
from llama_lab.training.saving.choice import told, way_out
from llama_lab.training.saving.manifest import is_whole, list_checkpoints, newest_damage
from llama_lab.training.saving.retention import check_disk, need
from llama_lab.training.schedule import lr_factor


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
        load_observers: gives the `observing.Observers`; called in every worker, so that it may import torch, and pickled by name.
        handle_signals: whether SIGTERM, SIGINT and SIGUSR1 end the run politely. False leaves the process's handlers alone.
        command: what was typed, kept in meta.json.
        extra_slug: what a sweep adds to the folder's name.

    Raises:
        ConfigError: this machine, the data or an existing folder do not allow the run.
        errors.RunFailed: the loss is no longer finite, memory ran out, a process of the run failed, …; its class says which.
    """
    stop, started = Stop(), "RANK" in os.environ and "WORLD_SIZE" in os.environ
    with stop_on_signals(stop, quiet=started and os.environ["RANK"] != "0") if handle_signals else contextlib.nullcontext():
        with stop.at_once():
            run = resolve(run)
        if run.hardware.micro_batch == AUTO:
            check_script(f"hardware.micro_batch={AUTO}")
        elif not started and run.hardware.processes != 1:
            check_script(f"hardware.processes={run.hardware.processes}")
        # A schedule that has no course yet would be found out where warm-up ends, maybe hours later.
        lr_factor(run.schedule, run.optim.max_lr, run.updates, run.updates)
        return (_follow if started else _lead)(run, load_observers, stop, command, extra_slug)


def _lead(
    run: RunConfig, load_observers: Callable[[], Any], stop: Stop, command: list[str] | None, extra_slug: str | None
) -> TrainResult:
    """Hold the run's folder, and train in this process or in others that it starts."""
    path = run_folder(run, extra_slug)
    with contextlib.ExitStack() as held:
        with stop.at_once():
            if RunFolder(path).finished and not run.fresh:
                refuse_other_data(run, RunFolder(path), _say)
                return _already(run, RunFolder(path), _say)
            if (shorter := shorter_run(run, path)) is not None:
                _say(shorter)
            data = _prepare(run, _say, held)
            run = settle_micro_batch(run, data, _say)
            forecast = _foreseen(run, RunFolder(path), data, command)
            folder = held.enter_context(open_run(run, path, origin=_origin(run, data, command)))
            if folder.finished:
                return _already(run, folder, _say)
            _begin(folder, data, forecast)
        with _recording(folder):
            status = (_alone if run.hardware.processes == 1 else _spawn)(run, folder, data, load_observers, stop)
        _learn(run, folder, data, status)
        return _result(folder, status)


def _alone(run: RunConfig, folder: RunFolder, data: PreparedData, load_observers: Callable[[], Any], stop: Stop) -> str:
    """Train in this very process."""
    from llama_lab.training.processes.worker import Place, join

    with join(run.hardware, Place()) as worker:
        return _work(run, folder, data, worker, load_observers, stop)


def _work(run: RunConfig, folder: RunFolder, data: PreparedData, worker: Any, load_observers: Callable[[], Any], stop: Stop) -> str:
    """Train as one worker, and close what was opened, whatever happens."""
    from llama_lab.training.announce import say_hello, say_results
    from llama_lab.training.console import Console
    from llama_lab.training.loop import train_run
    from llama_lab.training.plots import draw_plots
    from llama_lab.training.tracking.tracker import Tracker, start_tracker

    log = folder.path / "train.log"
    watchdog = _watchdog(run, folder, worker)
    with folder.writing():
        console = Console(log if worker.is_main else None, total=run.updates, enabled=worker.is_main)
    with console:
        tracker, exit_code = Tracker(), 1
        try:
            if worker.is_main:
                say_hello(run, folder, data, console)
                with folder.writing():
                    tracker = start_tracker(run, folder, console.say)
            with watchdog:
                status = train_run(run, folder, data, worker, load_observers(), stop, console, tracker, watchdog)
            exit_code = 0 if status == "finished" else 75
        except BaseException as error:
            told = explained(error, run, worker.device, watchdog.place)
            _note(log, folder, worker, told)
            if told is not error:
                raise told from error
            raise
        finally:
            tracker.finish(exit_code)
        if worker.is_main:
            _end(folder, status)
            try:
                draw_plots(folder.path, vocab_size=data.tokenizer.vocab_size)
                say_results(run, folder, data, status, tracker, console)
            except Exception:
                # The run is done and saved; a missing font or a closed terminal must not make it a failed one.
                console.note(traceback.format_exc())
                console.say("The pictures or closing words could not be made; train.log says why")
    return status


def _end(folder: RunFolder, status: str) -> None:
    """Note how a run ended."""
    try:
        folder.write_summary(status=status)
    except OSError as error:
        again = f"{remedy(error)} and type the same command again, which goes on from what is saved"
        raise SaveFailed(f"summary.json could not be written at the end ({why(error)}); {again}") from None


def _watchdog(run: RunConfig, folder: RunFolder, worker: Any) -> Watchdog:
    """What ends this worker if it stands still."""
    seconds = run.hardware.timeout_seconds

    def failed(message: str) -> None:
        with contextlib.suppress(OSError):
            folder.write_summary(status="failed", error=message)

    return Watchdog(
        rank=worker.place.rank,
        seconds=seconds,
        log=folder.path / "train.log",
        board=Board.beside(folder.path) if worker.is_grouped else None,
        settled=lambda: worker.shorten_waits(seconds),
        failed=failed,
    )


def _note(log: Path, folder: RunFolder, worker: Any, error: BaseException) -> None:
    """Write into train.log why a worker ends, and tell the other processes."""
    text = "".join(traceback.format_exception(error))
    if worker.is_grouped:
        rank, failure = worker.place.rank, failure_of(worker.place.rank, error)
        Board.beside(folder.path).report(failure)
        text = f"rank {rank} has lost contact: {failure.message}\n" if failure.is_consequence else f"rank {rank} has failed\n{text}"
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.write(text)


def _spawn(run: RunConfig, folder: RunFolder, data: PreparedData, load_observers: Callable[[], Any], stop: Stop) -> str:
    """Start one process a rank on this machine, forward a stop to them, and wait."""
    asked = multiprocessing.get_context("spawn").Event() if stop.listens else None
    board = Board.beside(folder.path)
    board.clear()
    with tempfile.TemporaryDirectory(prefix="llama_lab-") as meeting:
        # A file to meet at needs no port, so two runs on one machine cannot take each other's.
        arguments = (run, folder.path, data, f"file://{meeting}/store", load_observers, asked)
        try:
            run_ranks(_spawned, arguments, processes=run.hardware.processes or 1, board=board, stop=stop, asked=asked)
        except RankFailed as error:
            with contextlib.suppress(OSError), (folder.path / "train.log").open("a", encoding="utf-8") as log:
                log.write(f"{str(error).splitlines()[0]}\n")
            raise
        finally:
            board.clear()
    return folder.summary()["status"]


def _spawned(
    rank: int, run: RunConfig, path: Path, data: PreparedData, rendezvous: str, load_observers: Callable[[], Any], asked: Any
) -> None:
    """What a spawned process runs. Its parent alone listens to signals, and passes a stop on through `asked`."""
    from llama_lab.training.processes.worker import Place, join

    with join(run.hardware, Place(rank, run.hardware.processes or 1, rank, rendezvous)) as worker:
        _work(run, RunFolder(path), data, worker, load_observers, Stop(asked))


def _prepare(run: RunConfig, say: Callable[[str], None], held: contextlib.ExitStack) -> PreparedData:
    """The run's data, if it is enough for one window, and holds validation tokens where the run validates.

    Args:
        held: keeps it in the cache.
    """
    data = prepare(run.data, run.tokenizer, say)
    for source in data.sources:
        held.enter_context(in_use(source.folder))
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
    run: RunConfig, load_observers: Callable[[], Any], stop: Stop, command: list[str] | None, extra_slug: str | None
) -> TrainResult:
    """Be one of the processes that torchrun started: the first holds the folder, the others do as it says."""
    from llama_lab.training.processes.worker import Place, join

    place, folder = Place.from_environment(), RunFolder(run_folder(run, extra_slug))
    say = _say if place.rank == 0 else _silent
    if stop.listens:
        stop_with_parent(stop)
    with contextlib.ExitStack() as held:
        with stop.at_once():
            # The cache's lock lets one process prepare; the others wait for it and find the work done.
            data = _prepare(run, say, held)
            worker = held.enter_context(join(run.hardware, place))
        try:
            with stop.at_once():
                decision = _decide(run, folder, data, worker, command, held)
            if isinstance(decision, str):
                return _already(run, folder, say)
            run = replace(run, hardware=replace(run.hardware, micro_batch=decision))
            with _recording(folder) if worker.is_main else contextlib.nullcontext():
                status = _work(run, folder, data, worker, load_observers, stop)
        except Exception as error:
            if stop.listens:
                end_rank(place.rank, Board.beside(folder.path), error)
            raise
        return _result(folder, status)


def _decide(
    run: RunConfig, folder: RunFolder, data: PreparedData, worker: Any, command: list[str] | None, held: contextlib.ExitStack
) -> int | str:
    """What rank 0 finds about the run, on all ranks: that it is finished, or the micro-batch to go on with.

    Args:
        held: keeps the run's folder for rank 0.
    """
    import torch.distributed as dist

    decision: list[Any] = [None]
    refusal: Exception | None = None
    if worker.is_main:
        try:
            forecast = None
            if not folder.finished or run.fresh:
                run = settle_micro_batch(run, data, _say)
                forecast = _foreseen(run, folder, data, command)
            else:
                refuse_other_data(run, folder, _say)
            held.enter_context(open_run(run, folder.path, origin=_origin(run, data, command)))
            decision = ["finished" if folder.finished else run.micro_batch]
            if not folder.finished and forecast is not None:
                _begin(folder, data, forecast)
                Board.beside(folder.path).clear()
        except Exception as error:
            refusal = error
    dist.broadcast_object_list(decision)
    if refusal is not None:
        raise refusal
    if decision[0] is None:
        sys.exit(2)  # rank 0 says why, once
    return decision[0]


@contextlib.contextmanager
def _recording(folder: RunFolder) -> Iterator[None]:
    """Write into summary.json that the run is running, that it failed if it does, and the seconds that its starts took in all."""
    with folder.writing():
        folder.write_summary(status="running", error=None)
    before, start = folder.summary().get("wall_seconds", 0.0), time.monotonic()
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            folder.write_summary(status="failed", error=f"{type(error).__name__}: {error}"[:2000])
        raise
    finally:
        with contextlib.suppress(OSError):
            folder.write_summary(wall_seconds=round(before + time.monotonic() - start, 3))


def _already(run: RunConfig, folder: RunFolder, say: Callable[[str], None]) -> TrainResult:
    result = _result(folder, "already finished")
    values = ", ".join(
        f"{key} {value:.4f}" for key in ("val/loss", "val/bits_per_byte") if (value := result.summary.get(key)) is not None
    )
    say(f"Already finished: {relative(folder.path)} ({result.updates} updates{', ' + values if values else ''})")
    whole = None
    if (error := newest_damage(folder.checkpoints)) is not None:
        say(f"  damaged: {told(error)}; {way_out(folder)}")
        whole = [checkpoint.update for checkpoint in list_checkpoints(folder.checkpoints) if is_whole(checkpoint)]
    restore_config(run, folder, say)
    if (longer := extending_command(run, folder.path, 2 * run.training_tokens, updates=whole)) is not None:
        say(f"  to train it further: {longer}")
    say("  fresh=true trains it anew; another seed, training_tokens or any other scientific value is a run of its own")
    return result


def _result(folder: RunFolder, status: str) -> TrainResult:
    summary = folder.summary()
    return TrainResult(folder.path, status, summary.get("update", 0), summary.get("tokens", 0), summary)


def _origin(run: RunConfig, data: PreparedData, command: list[str] | None) -> dict[str, Any]:
    fingerprints = {"data": data.fingerprint, "tokenizer": data.tokenizer.hash}
    return describe_origin(run, command=command, data=fingerprints, validation=data.validation_text)


def _foreseen(run: RunConfig, folder: RunFolder, data: PreparedData, command: list[str] | None) -> Forecast:
    """What the run will take in all; refused where what is left of it is more than it may."""
    forecast = foresee(run, data)
    words = command[2:] if command is not None and command[1:2] == ["train"] else ["…"]
    plan = shlex.join(["llama-lab", "plan", "--probe", *words]).replace("'…'", "…")
    keep_to_budget(run.budget, [forecast], "this run", plan, left=[folder.left(run)])
    return forecast


def _begin(folder: RunFolder, data: PreparedData, forecast: Forecast) -> None:
    """Write a run's tokenizer, and what was foreseen before its first update, to be held against what becomes true."""
    with folder.writing():
        if "predicted" not in folder.meta():
            folder.write_meta(predicted=forecast.saved())
        if folder.meta().get(MADE_BY) != (key := data.key):
            folder.write_meta(**{MADE_BY: key})
        data.tokenizer.save(folder.path / "tokenizer.json")


def _learn(run: RunConfig, folder: RunFolder, data: PreparedData, status: str) -> None:
    """Correct a probe that was made while the machine was busy, now that a whole run has taken much less."""
    from llama_lab.training.metrics import short_time

    meta = folder.meta()
    if status != "finished" or len(meta["starts"]) > 1 or "lineage" in meta:  # then it has trained a part alone
        return
    with contextlib.suppress(OSError):
        if (foreseen := correct_probe(run, data, folder.summary()["wall_seconds"])) is not None:
            _say(f"A probe had foreseen {short_time(foreseen)}, made while this machine was busy; it is corrected")


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    """Say nothing."""
