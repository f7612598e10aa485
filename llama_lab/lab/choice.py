"""Which checkpoint of a run is meant: a number, `last` or `best`."""

from llama_lab.config.errors import ConfigError
from llama_lab.training.run_folder import RunFolder


def chosen_update(parent: RunFolder, there: list[int], update: str | None, *, scope: str) -> int:
    """The number of the update that was meant.

    Args:
        there: updates that have a checkpoint, in order. A number that is typed need not be among them.
        update: as typed: a number, `last` or `best` by validation; None: last.
        scope: what a problem is reported in.

    Raises:
        ConfigError: it is none of these, there is no checkpoint, or none that was validated.
    """
    if update is not None and update.isdecimal():
        return int(update)
    if update not in (None, "last", "best"):
        raise ConfigError([(f"--update {update}", f"is no update; {there_are(there)}, or last, or best")], scope=scope)
    if not there:
        raise ConfigError([(str(parent.path), "has no checkpoint yet; train it further")], scope=scope)
    if update != "best":
        return there[-1]

    from llama_lab.training.metrics import read_rows

    rows = read_rows(parent.path / "metrics.jsonl")
    losses = {row["update"]: row["val/loss"] for row in rows if row.get("val/loss") is not None and row["update"] in there}
    if not losses:
        raise ConfigError([("--update best", f"cannot be told: no checkpoint was validated; {there_are(there)}")], scope=scope)
    return min(losses, key=lambda number: (losses[number], number))


def there_are(updates: list[int]) -> str:
    """Which checkpoints there are, in words."""
    if len(updates) == 1:
        return f"the only one is {updates[0]}"
    return f"there are {', '.join(map(str, updates))}" if updates else "there is none"
