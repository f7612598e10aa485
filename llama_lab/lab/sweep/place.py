"""Where the jobs of a sweep run: what the sweep asks of such a place, and which one it is."""

from typing import Any, Protocol

from llama_lab.config.schema import Launcher
from llama_lab.lab.sweep.job_process import Request
from llama_lab.lab.sweep.jobs import Job, Outcome, Sweep


class Started(Protocol):
    """A job that was started somewhere."""

    def ended(self) -> Outcome | None:
        """How it ended, if it has."""
        ...

    def stop(self) -> None:
        """Ask it to save its state and end; asked again, it ends at once."""
        ...

    def kill(self) -> None:
        """End it and whatever it started."""
        ...


class Place(Protocol):
    """Where jobs run."""

    says: str
    requeues: bool

    def room_for(self, job: Job) -> bool:
        """Whether a job can be started now."""
        ...

    def has(self, job: Job) -> bool:
        """Whether an earlier start of the sweep has left the job there, so that `start` finds it."""
        ...

    def start(self, job: Job, request: Request) -> Any:
        """Start a job there is room for."""
        ...

    def done(self, running: Any) -> None:
        """Free what a job had that has ended."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait until a job ends, or so long."""
        ...


def choose_place(sweep: Sweep) -> Place:
    """Where a sweep asks for its jobs to run.

    Raises:
        ConfigError: this machine lacks what that needs.
    """
    if sweep.settings.launcher is Launcher.slurm:
        from llama_lab.lab.sweep.slurm import Slurm

        return Slurm(sweep)
    from llama_lab.lab.sweep.local import Local

    return Local(sweep)
