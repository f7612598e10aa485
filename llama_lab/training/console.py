"""What a person sees while a run trains: plain lines, and under them a progress bar where there is a terminal."""

import contextlib
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

TRAINING = "training"


class Terminal(RichConsole):
    """Where lines are shown, as they are. Work goes on in silence when the reader of a pipe leaves, as `head` does."""

    def __init__(self) -> None:
        super().__init__(highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Show nothing any more. rich's own would end the process."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Prints lines on the terminal and into the run's train.log. Use it as a context, which shows the bar.

    Args:
        log: file that lines are appended to; null: none.
        total: updates of the whole run, the bar's end.
        enabled: whether anything is shown at all; false on every rank but the first.

    `NO_COLOR` in the environment turns colours off; without a terminal there is no bar, only lines.
    """

    def __init__(self, log: Path | None, *, total: int, enabled: bool = True):
        self._enabled = enabled
        self._log = log.open("a", encoding="utf-8", buffering=1) if enabled and log is not None else None
        self._rich = Terminal()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("updates"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._rich,
            transient=True,
            disable=not (enabled and self._rich.is_terminal),
        )
        self._task = self._bar.add_task(TRAINING, total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()

    def say(self, text: str, style: str | None = None) -> None:
        """Print one or several lines, as they are. `style` is seen on a terminal only."""
        if self._enabled:
            self.note(text)
            # A terminal that was closed, or a pipe whose reader left, is no reason to stop training.
            with contextlib.suppress(OSError, UnicodeError):
                self._rich.print(text, style=style, markup=False, emoji=False)

    def note(self, text: str) -> None:
        """Write into train.log without showing it."""
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk
                self._log.write(text + "\n")

    def progress(self, update: int) -> None:
        """Move the bar to `update`."""
        self._bar.update(self._task, completed=update)

    def phase(self, word: str) -> None:
        """Say beside the bar, whose clock goes on, what is being done; empty: training."""
        self._bar.update(self._task, description=word or TRAINING)
