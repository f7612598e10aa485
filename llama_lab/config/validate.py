"""What spans the nodes of a run. Collects, raises once, never edits."""

import re
from collections.abc import Collection

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import GROUPS, Problem, RunConfig, WsdConfig, nearest_multiples

NODES = ("seed", *GROUPS, "log", "eval", "sample", "checkpoint", "guard", "budget", "wandb", "sweep")


def validate(run: RunConfig) -> None:
    """Refuse a run that cannot be trained as it says.

    Raises:
        ConfigError: every problem of every node, and of the nodes taken together.
    """
    if found := problems(run):
        raise ConfigError(found)


def problems(run: RunConfig, unclear: Collection[str] = ()) -> list[Problem]:
    """Everything wrong with a run. Rules between nodes are asked only where each node is sound in itself.

    Args:
        unclear: nodes that are not what the user meant, because of another mistake; nothing is said of them.
    """
    found = _top_level(run)
    broken = {*unclear, *(["training_tokens"] if run.training_tokens < 1 else [])}
    for name in NODES:
        node = getattr(run, name)
        if node is not None and name not in unclear and (own := node.problems(name)):
            found += own
            broken.add(name)
    if "data" not in broken:
        found += _windows(run) or ([] if "hardware" in broken else too_many_processes(run, run.hardware.processes or 1))
    if not broken & {"data", "training_tokens"}:
        found += _budget(run)
        if run.updates and "schedule" not in broken:
            found += _schedule(run)
    if not broken & {"schedule", "optim"} and run.schedule.min_lr > run.optim.max_lr:
        rule = f"is above optim.max_lr={run.optim.max_lr}; try {run.optim.max_lr / 10:g}"
        found.append((f"schedule.min_lr={run.schedule.min_lr}", rule))
    return found


def _top_level(run: RunConfig) -> list[Problem]:
    found: list[Problem] = []
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", run.name) or run.name.endswith("."):
        works = re.sub(r"[^A-Za-z0-9._-]+", "_", run.name).strip("._-")[:100] or "my_study"
        rule = f"cannot name a folder: letters, digits, '.', '_', '-', at most 100; e.g. name={works}"
        found.append((f"name={run.name!r}", rule))
    if run.training_tokens < 1:
        usual = run.origin.base.get("training_tokens")
        works = f"; try {usual}" if isinstance(usual, int) and usual >= 1 else ""
        found.append((f"training_tokens={run.training_tokens}", f"is below 1{works}"))
    if run.fresh and run.accept_changes:
        found.append(("accept_changes=true", "contradicts fresh=true, which starts anew; leave one of them out"))
    return found


def _windows(run: RunConfig) -> list[Problem]:
    data = run.data
    if data.tokens_per_update % data.max_seq_len == 0:
        return []
    rule = f"is not a multiple of data.max_seq_len={data.max_seq_len}; " + nearest_multiples(
        data.tokens_per_update, data.max_seq_len
    )
    return [(f"data.tokens_per_update={data.tokens_per_update}", rule)]


def too_many_processes(run: RunConfig, processes: int) -> list[Problem]:
    """What is wrong if there is not a window of an update for each process. Otherwise any number will do: shares may be uneven."""
    data, windows = run.data, run.windows_per_update
    if processes <= windows:
        return []
    has = "1 window" if windows == 1 else f"{windows} windows"
    rule = f"is {has} of {data.max_seq_len}, too few for {processes} processes to have one each; "
    rule += f"at least {processes * data.max_seq_len}, or hardware.processes={windows}"
    return [(f"data.tokens_per_update={data.tokens_per_update}", rule)]


def _budget(run: RunConfig) -> list[Problem]:
    if run.updates >= 1:
        return []
    update = run.data.tokens_per_update
    return [
        (f"training_tokens={run.training_tokens}", f"is less than one update of data.tokens_per_update={update}; at least {update}")
    ]


def _schedule(run: RunConfig) -> list[Problem]:
    schedule, updates = run.schedule, run.updates
    warmup = f"schedule.warmup_updates={schedule.warmup_updates}"
    if schedule.warmup_updates >= updates:
        rule = f"is not below the run's {updates} updates; the run would never leave warm-up; try {updates // 10}"
        return [(warmup, rule)]
    if isinstance(schedule, WsdConfig) and (stable := updates - schedule.cooldown_updates(updates)) < schedule.warmup_updates:
        most = int(100 * (1 - schedule.warmup_updates / updates)) / 100
        works = f"at most {most}" if most else "schedule=linear has no stable part"
        works += f", or schedule.warmup_updates={stable}"
        rule = f"leaves no room for {warmup} in the run's {updates} updates; {works}"
        return [(f"schedule.cooldown_fraction={schedule.cooldown_fraction}", rule)]
    return []
