"""One run in a process of its own: what a launcher starts, and what answers in that process.

A process of its own buys that no GPU memory leaks from one job into the next, that a crash takes nothing else along, and that one
job's settings of torch, tracker and environment never reach another. It trains the frozen config that it is pointed to, writes what
it prints beside that, and leaves its answer in a file. A job whose launcher dies saves its state and ends, so that the next start
finds it so.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from types import FrameType

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config
from llama_lab.lab.sweep.jobs import BEFORE_START, Outcome
from llama_lab.training.errors import RunFailed
from llama_lab.training.processes.stop import NUMBERS, ignore_signals
from llama_lab.training.run_folder import write_json

WARM = ("llama_lab.training.warm", "llama_lab.inference.observers")
"""What a process imports before a job is known, so that the job need not: with torch, seconds."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a job is to do.

    Attributes:
        config: its frozen config.
        output: file that gets what it prints.
        answer: file for its outcome.
        command: what would be typed to start this run alone, for its records.
        slug: what the sweep adds to the run's folder name; null: nothing.
        environment: the environment it runs in; null: the one it finds.
        threads: of the CPU that torch may use; null: as the environment says.
    """

    config: Path
    output: Path
    answer: Path
    command: list[str]
    slug: str | None
    environment: dict[str, str] | None = None
    threads: int | None = None


def be_job(request: Request) -> None:
    """Be the job, from the first line of output to the exit code."""
    start = time.monotonic()
    if request.environment is not None:
        os.environ.clear()
        os.environ.update(request.environment)
    if parent_process() is not None:
        if os.name == "posix":
            # Ctrl-C in the terminal reaches the job once, from its launcher, and its own processes not behind its back.
            os.setsid()
        threading.Thread(target=_stop_with_launcher, name="launcher", daemon=True).start()
    _write_to(request.output)
    for number in NUMBERS:
        # Until training listens itself; Slurm's sends one near the end of a job's time, which may be while torch is imported.
        signal.signal(number, _leave)
    if hasattr(signal, "pthread_sigmask"):
        # Started with them kept back, so that none was lost until now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)
    outcome = _train(request)
    ignore_signals()
    outcome.process_seconds = round(time.monotonic() - start, 2)
    write_json(request.answer, asdict(outcome))
    if outcome.failed:
        sys.exit(1)


def read_answer(path: Path) -> Outcome | None:
    """What a job left, if it came so far; the file goes."""
    if not path.is_file():
        return None
    outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    path.unlink()
    return outcome


def _train(request: Request) -> Outcome:
    try:
        if request.threads is not None:
            from llama_lab.training.warm import use_threads

            use_threads(request.threads)
        from llama_lab.api import train

        run = load_config(request.config)
        result = train(run, handle_signals=True, command=request.command, extra_slug=request.slug)
        if result.status == "already finished":
            _draw(result.folder)
        return Outcome(result.status, str(result.folder), result.updates, result.tokens, result.summary)
    except (ConfigError, RunFailed) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return _failed(error)
    except (KeyboardInterrupt, SystemExit):
        return Outcome(BEFORE_START)
    except Exception as error:
        traceback.print_exc()
        return _failed(error)


def _draw(folder: Path) -> None:
    """The pictures of a run that was killed after its last update."""
    from llama_lab.data.tokenizer import load_tokenizer
    from llama_lab.training.plots import draw_plots

    draw_plots(folder, vocab_size=load_tokenizer(folder / "tokenizer.json").vocab_size)


def _failed(error: Exception) -> Outcome:
    kind = type(error).__name__
    return Outcome(f"failed ({kind})", kind=kind, message=str(error))


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _write_to(path: Path) -> None:
    """From here on print into a file, behind what an earlier start printed."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace", line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]


def _stop_with_launcher() -> None:
    """Ask this process to save and end once its launcher is gone: another start of the sweep will want to go on with the run."""
    launcher = parent_process()
    assert launcher is not None
    connection.wait([launcher.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
