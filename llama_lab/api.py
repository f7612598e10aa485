"""The suite in Python: `compose`, `train`, `load`, as a script or a notebook calls them.

This is also where the layers meet: training is handed the functions of inference that it calls.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import RunConfig
from llama_lab.config.validate import validate

if TYPE_CHECKING:
    from llama_lab.inference.load import LoadedRun
    from llama_lab.training.launch import TrainResult
    from llama_lab.training.observing import Observers

__all__ = ["ConfigError", "compose", "load", "train"]


def train(
    run: RunConfig, *, handle_signals: bool = False, command: list[str] | None = None, extra_slug: str | None = None
) -> "TrainResult":
    """Train a run to its end, or go on with it where it stands.

    A script that trains on several processes does so below `if __name__ == "__main__":`, since each of them imports it.

    Args:
        run: what `compose` returned; values that were changed since are checked once more.
        handle_signals: whether SIGTERM, SIGINT and SIGUSR1 end the run politely after the current update, as on the command
            line; only the main thread can. False leaves the caller's handlers alone.
        command: what was typed, if anything; kept in the run's meta.json.
        extra_slug: what a sweep adds to the folder's name for values outside the science.

    Returns:
        Folder, status, counts and the last values of every metric.

    Raises:
        ConfigError: the run's own values, this machine, the data or an existing folder do not allow it.
        training.errors.RunFailed: the loss is no longer finite, memory ran out, …; its class says which.
    """
    if not isinstance(run, RunConfig):
        raise ConfigError([(f"run={run!r}", "is no run; llama_lab.compose([...]) makes one")], scope="this call")

    validate(run)
    from llama_lab.inference.check import check_observed
    from llama_lab.training.launch import launch

    check_observed(run)
    return launch(run, _load_observers, handle_signals=handle_signals, command=command, extra_slug=extra_slug)


def load(
    run_folder: str | Path,
    update: int | Literal["last", "best"] | None = None,
    *,
    device: str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> "LoadedRun":
    """Open a run's checkpoint: its model, tokenizer and config, to continue texts with or to look inside.

    Args:
        run_folder: the run's folder, its name, or the hash at the end of that; the run may be training.
        update: number of the update that the checkpoint follows; `best`: by validation; None or `last`: the newest.
        device: `cpu`, `cuda`, `mps`, or `auto` for the best there is.
        precision: dtype of the weights and of all that is computed with them.

    Raises:
        ConfigError: the folder holds no run, or no such checkpoint; or this machine has no such device.
    """
    if not isinstance(run_folder, str | Path):
        rule = "is no path; name a run's folder, outputs/<name>/<run id>"
        raise ConfigError([(f"run_folder={run_folder!r}", rule)], scope="this call")

    from llama_lab.inference.load import load_run

    return load_run(Path(run_folder), update, device=device, precision=precision)


def _load_observers() -> "Observers":
    from llama_lab.inference.observers import OBSERVERS

    return OBSERVERS
