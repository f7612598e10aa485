"""How far runs of one config scatter by chance: measured, split by where chance comes in, and stored for later comparisons.

    runs of one config with different seeds -> pooled variances -> outputs/noise/<family>.json -> compare

A family is what shares a floor: configs with the same model, data, tokenizer, precision and budget. Optimizer and schedule may
differ, so that what was measured on one variant serves the others.
"""

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Problem
from llama_lab.lab.compare.arms import CONTENT, unfinished_runs
from llama_lab.lab.compare.records import RunRecord
from llama_lab.lab.compare.statistics import noise_interval
from llama_lab.training.run_folder import write_json

FORMAT_VERSION = 1
METRICS = ("val/loss", "val/bits_per_byte", "train/loss")
BOTH, INIT, ORDER, KERNELS = "seeds", "init", "order", "kernels"
VARIANTS = ("optim", "schedule")
"""Parts of a config that do not change its family."""


@dataclass(frozen=True, slots=True)
class Scatter:
    """Standard deviation of one metric under one kind of chance.

    Attributes:
        sd: of single runs.
        low, high: 95 % interval of it, for normal noise.
        degrees_of_freedom: how much was measured.
    """

    sd: float
    low: float
    high: float
    degrees_of_freedom: int


@dataclass(frozen=True, slots=True)
class Floor:
    """The noise of a config family.

    Attributes:
        family: its hash.
        scatter: metric -> kind of chance -> what was measured. `seeds`: initial weights and order of the data both differ; `init`,
            `order`: one of them; `kernels`: nothing differs but how the device adds up. Each kind holds what `kernels` does.
        measured_on: optimizer and schedule of the runs, by key path.
        runs: their folders.
        measured: when.
    """

    family: str
    scatter: dict[str, dict[str, Scatter]]
    measured_on: dict[str, Any]
    runs: list[str]
    measured: str

    def of(self, metric: str) -> Scatter | None:
        """What single runs of different seeds scatter by; the largest that was measured if not both seeds were varied at once."""
        kinds = self.scatter.get(metric, {})
        if BOTH in kinds:
            return kinds[BOTH]
        return max(kinds.values(), key=lambda scatter: scatter.sd, default=None)


def measure(runs: Sequence[RunRecord]) -> Floor:
    """The noise floor that finished runs of one config show.

    Raises:
        ConfigError: they differ in more than seeds, are not finished, have no metrics or nothing to be compared with.
    """
    _check(runs)
    scatter: dict[str, dict[str, Scatter]] = {}
    for metric in METRICS:
        values = {id(run): run.last(metric) for run in runs if any(metric in row for row in run.rows)}
        if len(values) < len(runs):
            continue
        if broken := [run.name for run in runs if values[id(run)] is None]:
            raise _refused([(name, f"has no finite {metric} at its end; leave it out and say so") for name in broken])
        scatter[metric] = _split(runs, lambda run, values=values: float(values[id(run)] or 0.0))
    if not scatter:
        raise _refused([(runs[0].name, f"has none of {', '.join(METRICS)}")])
    if not any(scatter.values()):
        rule = f"has nothing to be compared with: two runs of any seeds are the least; {_making(runs[0])} makes them"
        raise _refused([(runs[0].name, rule)])
    variant = {key: value for key, value in runs[0].values.items() if key.partition(".")[0] in VARIANTS}
    names = [str(run.folder or run.name) for run in runs]
    return Floor(family(runs[0].values), scatter, variant, names, time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def family(values: dict[str, Any]) -> str:
    """12 hexadecimal digits that stand for what shares a floor.

    Args:
        values: a record's: everything that decides its curve, seeds left out.
    """
    kept = {key: value for key, value in values.items() if key.partition(".")[0] not in VARIANTS and key != CONTENT}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def store(floor: Floor, outputs: Path) -> Path:
    """Write a floor where `find_floor` looks for it; one that was there is replaced."""
    path = outputs / "noise" / f"{floor.family}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format_version": FORMAT_VERSION, **asdict(floor)})
    return path


def find_floor(run: RunRecord) -> Floor | None:
    """The floor of a run's family, if it was measured in the same outputs folder."""
    if run.folder is None:
        return None
    path = run.folder.parent.parent / "noise" / f"{family(run.values)}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        scatter = {metric: {kind: Scatter(**found) for kind, found in kinds.items()} for metric, kinds in known["scatter"].items()}
        return Floor(known["family"], scatter, known["measured_on"], known["runs"], known["measured"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def own_part(floor: Floor, metric: str, kind: str) -> float:
    """The standard deviation that a kind of chance has of its own, without that of the kernels which it holds."""
    kinds = floor.scatter[metric]
    if kind == KERNELS or KERNELS not in kinds:
        return kinds[kind].sd
    return math.sqrt(max(0.0, kinds[kind].sd ** 2 - kinds[KERNELS].sd ** 2))


def _check(runs: Sequence[RunRecord]) -> None:
    found: list[Problem] = list(unfinished_runs(runs))
    found = [(name, f"{said}; a floor is measured on finished runs") for name, said in found]
    found += _several(runs)
    first = runs[0]
    for run in runs[1:]:
        if first.values == run.values and first.meta.get("data") != run.meta.get("data"):
            found.append((run.name, f"was trained on other data than {first.name}; a floor is measured on the same"))
    if any(not run.seeds for run in runs):
        found.append((next(run.name for run in runs if not run.seeds), "does not say its seeds"))
    if found:
        raise _refused(found)


def _several(runs: Sequence[RunRecord]) -> list[Problem]:
    """That runs are of several configs, with the command that measures the one of which there are most."""
    configs: dict[str, list[RunRecord]] = {}
    for run in runs:
        configs.setdefault(json.dumps(run.values, sort_keys=True, default=str), []).append(run)
    if len(configs) == 1:
        return []
    keys = dict.fromkeys(key for run in runs for key in run.values if run.values[key] != runs[0].values.get(key))
    most = max(configs.values(), key=len)
    command = shlex.join(["llama-lab", "noise", *(run.name for run in most)]) if len(most) > 1 else _making(most[0])
    rule = f"have {len(configs)} configs, which differ in {', '.join(list(keys)[:3])}; a floor is measured on runs that differ in "
    return [(f"these {len(runs)} runs", f"{rule}seeds alone; try {command}")]


def _making(run: RunRecord) -> str:
    """The command that makes runs of a run's config and measures them."""
    words = run.meta.get("command") or []
    if words[:2] != ["llama-lab", "train"]:
        return "llama-lab noise with the overrides that made it"
    return shlex.join(["llama-lab", "noise", *(word for word in words[2:] if not word.startswith(("seed.init=", "seed.data=")))])


def _split(runs: Sequence[RunRecord], value: Callable[[RunRecord], float]) -> dict[str, Scatter]:
    """Kind of chance -> scatter, where there are runs that show it."""
    once: dict[tuple[int, int], list[float]] = {}
    alike: dict[tuple[object, ...], list[float]] = {}
    for run in runs:
        seeds = run.seeds["seed.init"], run.seeds["seed.data"]
        once.setdefault(seeds, []).append(value(run))
        alike.setdefault((*seeds, *_made_on(run)), []).append(value(run))
    first = {seeds: found[0] for seeds, found in once.items()}
    groups = {
        BOTH: [[first[seeds] for seeds in _unrelated(sorted(first))]],
        INIT: _apart([(order, init, found) for (init, order), found in first.items()]),
        ORDER: _apart([(init, order, found) for (init, order), found in first.items()]),
        KERNELS: list(alike.values()),
    }
    pooled = {kind: _pool(lists) for kind, lists in groups.items()}
    return {kind: scatter for kind, scatter in pooled.items() if scatter is not None}


def _made_on(run: RunRecord) -> tuple[object, ...]:
    """What decides, beside the config, on how a run adds up."""
    machine = run.meta.get("machine") or {}
    keys = ("device", "processor", "processes", *(("threads",) if machine.get("device") == "cpu" else ()))
    return tuple(machine.get(key) for key in keys)


def _unrelated(seeds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs of seeds no two of which share one."""
    chosen: list[tuple[int, int]] = []
    for init, order in sorted(seeds, key=lambda pair: (pair[0] != pair[1], pair)):
        if all(init != other and order != another for other, another in chosen):
            chosen.append((init, order))
    return chosen


def _apart(runs: list[tuple[int, int, float]]) -> list[list[float]]:
    """Values in groups of runs that share one seed and differ in the other.

    Two groups with the same other seeds would say the same twice, so each of those counts in one group only, the largest first.

    Args:
        runs: (seed that a group shares, seed that varies in it, value).
    """
    groups: dict[int, list[tuple[int, float]]] = {}
    for shared, varied, value in runs:
        groups.setdefault(shared, []).append((varied, value))
    used: set[int] = set()
    found: list[list[float]] = []
    for group in sorted(groups.values(), key=len, reverse=True):
        found.append([value for varied, value in group if varied not in used])
        used |= {varied for varied, _ in group}
    return [group for group in found if group]


def _pool(groups: list[list[float]]) -> Scatter | None:
    """The standard deviation within groups; None if no group has two values."""
    freedom = sum(len(group) - 1 for group in groups)
    if freedom < 1:
        return None
    squares = sum(float(np.square(np.array(group) - np.mean(group)).sum()) for group in groups)
    sd = math.sqrt(squares / freedom)
    low, high = noise_interval(sd, freedom)
    return Scatter(sd, low, high, freedom)


def _refused(problems: list[Problem]) -> ConfigError:
    return ConfigError(problems, scope="this noise floor")
