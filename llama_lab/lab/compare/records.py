"""Runs as a comparison sees them: what decided them, what they were validated on, and their curves. Nothing is computed here.

    folders, patterns, sweeps, CSV files -> RunRecord each

A record is small: rows without samples and batches, the config by key path.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from glob import has_magic
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import SCIENCE, former_values, load_config, science
from llama_lab.config.paths import or_meant
from llama_lab.config.schema import Origin, Problem, RunConfig, SeedConfig
from llama_lab.lab.compare.csv_table import Line, in_terms_of, is_about, read_lines, result_columns
from llama_lab.lab.patterns import is_aside, matches
from llama_lab.lab.runs.listing import status_of
from llama_lab.lab.runs.sweeps import STOPPED_EARLY, has_typed_order
from llama_lab.training.metrics import read_rows
from llama_lab.training.run_folder import RunFolder, relative

PATHS = ("data.path", "data.paths", "tokenizer.path")
"""Where data lies, which is no difference where its fingerprints are equal."""
SEEDS = ("seed.init", "seed.data", "seed.sampling")
AXES = ("tokens", "flops", "seconds", "cost")
SEED_NODE = re.compile(r"^seed:\n  init: (?P<init>\d+)\n  data: (?P<data>\d+)\n  sampling: (?P<sampling>\d+)\n", re.MULTILINE)
SHAPES_NODE = re.compile(r"^  shapes:\n(?:    .*\n)+", re.MULTILINE)
# How `llama-lab noise` names a run that it makes again with the same seeds.
REPEAT = re.compile(r"-repeat-\d+-[0-9a-f]{8}$")
OURS = {item.name for item in fields(RunConfig)}


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: how it is spoken of: its folder as short as it can be typed, or its name in a CSV.
        values: key path -> value of everything that decides its curve, seeds left out.
        seeds: by key path.
        status: what it says of itself; `dead` where it says that it runs and no process of it does; `stopped early` where a sweep
            left it before its end.
        rows: its metrics, in order; a single one if it comes from a CSV.
        folder: null if it comes from a CSV.
        run: its config; null if it comes from a CSV.
        meta: where it came from.
        line: of its CSV; empty if it has a folder.
    """

    name: str
    values: dict[str, Any]
    seeds: dict[str, int]
    status: str
    rows: list[dict[str, Any]]
    folder: Path | None = None
    run: RunConfig | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    line: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether it has done all of its updates."""
        return self.status == "finished"

    @property
    def is_stopped_early(self) -> bool:
        """Whether a sweep left it before its end, so that the sweep's command does not go on with it."""
        return self.status == STOPPED_EARLY

    @property
    def is_repeat(self) -> bool:
        """Whether it was made to repeat another run, seeds included, so that it says nothing that the other does not."""
        return self.folder is not None and REPEAT.search(self.folder.name) is not None

    @property
    def seed(self) -> tuple[int, ...]:
        """What pairs it with a run of another arm: the seeds of weights and of data; a CSV's own."""
        ours = [self.seeds[key] for key in SEEDS[:2] if key in self.seeds]
        return tuple(ours or (value for key, value in self.seeds.items() if key not in SEEDS))

    @property
    def seed_said(self) -> str:
        """Its seed in a few characters."""
        return "/".join(map(str, dict.fromkeys(self.seed))) if len(set(self.seed)) <= 1 else "/".join(map(str, self.seed))

    @cached_property
    def flops_per_token(self) -> float:
        """To train on one token; not a number if it comes from a CSV or its tokenizer is gone."""
        if self.run is None or self.folder is None:
            return math.nan
        from llama_lab.data.tokenizer import load_tokenizer
        from llama_lab.model.count import flops_per_token

        try:
            vocab_size = load_tokenizer(self.folder / "tokenizer.json").vocab_size
        except ConfigError:
            return math.nan
        return float(flops_per_token(self.run.model, vocab_size, self.run.data.max_seq_len))

    @property
    def processes(self) -> int:
        """Devices that it was trained on at once."""
        return int((self.meta.get("machine") or {}).get("processes") or 1)

    def curve(self, metric: str, axis: str = "tokens", price: float = 0.0) -> list[tuple[float, float | None]]:
        """(where, value) of each row that has the metric, in order; None for a value that is no finite number.

        Args:
            axis: one of `AXES`.
            price: of a device for an hour, for `cost`.
        """
        scale = {
            "tokens": ("tokens", 1.0),
            "flops": ("tokens", self.flops_per_token if axis == "flops" else 1.0),
            "seconds": ("seconds", 1.0),
            "cost": ("seconds", price * self.processes / 3600),
        }
        key, factor = scale[axis]
        return [(row[key] * factor, row[metric]) for row in self.rows if metric in row and row.get(key) is not None]

    def last(self, metric: str) -> float | None:
        """The metric's value at the end; None if it is no finite number.

        Raises:
            KeyError: no row has it.
        """
        for row in reversed(self.rows):
            if metric in row:
                return row[metric]
        raise KeyError(metric)

    @property
    def metrics(self) -> list[str]:
        """Keys of what was measured."""
        return sorted({key for row in self.rows for key in row if "/" in key or self.folder is None})


def load_records(words: Iterable[str], *, metric: str | None = None) -> list[RunRecord]:
    """The runs that words name, in their order, each once.

    Args:
        metric: a column of W&B's table that is one, though its name does not say so.
        words: run folders, folders of runs, patterns of either, a sweep's folder or `summary.csv`, a CSV of W&B's table of runs.

    Raises:
        ConfigError: a word names no run, or a file cannot be read; all of them at once.
    """
    found: dict[Path, RunRecord] = {}
    others: dict[tuple[Path, int], RunRecord] = {}
    problems: list[Problem] = []
    for word in words:
        try:
            folders, table = _named(word, metric)
            for number, line in enumerate(table):
                others.setdefault((Path(word).expanduser().resolve(), number), line)
            new = [folder for folder in folders if folder.resolve() not in found]
            records = [load_record(folder) for folder in new]
            for record in records if has_typed_order(_sweep_of(Path(word).expanduser())) else in_order(records):
                assert record.folder is not None
                found.setdefault(record.folder.resolve(), record)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), scope="this request")
    runs = _one_path(found.values())
    return [*runs, *_in_terms_of(runs, _told_apart(list(others.values())))]


def _one_path(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """The runs, those trained on equal tokens said to be from one path: what a folder is called is no science."""
    paths: dict[str, dict[str, Any]] = {}
    found = []
    for run in runs:
        own = {key: run.values[key] for key in PATHS if key in run.values}
        data = run.meta.get("data", {}).get("data")
        known = paths.setdefault(data, own) if data is not None else own
        found.append(replace(run, values=run.values | known) if known.keys() == own.keys() and known != own else run)
    return found


def _in_terms_of(runs: list[RunRecord], lines: list[RunRecord]) -> list[RunRecord]:
    """Runs of tables with their configs as those of folders have them."""
    if not runs or not lines:
        return lines
    former = {key: value for run in runs if run.run is not None for key, value in former_values(run.run).items()}
    known = {key: [value] for key, value in former.items()}
    for run in runs:
        for key, value in run.values.items():
            if value not in (there := known.setdefault(key, [])):
                there.append(value)
    found = []
    for line in lines:
        values = in_terms_of(known, line.values)
        # What is off in all runs of a table has no column there.
        off = [(run, key) for run in runs for key, value in run.values.items() if value is None and key not in values]
        values |= {key: None for run, key in off if values.get(part := key.partition(".")[0]) == run.values.get(part)}
        found.append(replace(line, values={key: values[key] for key in values if former.get(key, ...) != values[key]}))
    return found


def _told_apart(runs: list[RunRecord]) -> list[RunRecord]:
    """Runs of tables under different names: W&B lets several have the same, and values are kept by name."""
    names = Counter(run.name for run in runs)
    return [run if names[run.name] == 1 else replace(run, name=f"{run.name} ({run.line})") for run in runs]


def load_record(folder: Path) -> RunRecord:
    """The run in a folder.

    Raises:
        ConfigError: its config or its rows cannot be read.
    """
    run = _load_config(folder / "config.yaml")
    opened = RunFolder(folder)
    values = flat(science(run))
    seeds = {key: values.pop(key) for key in SEEDS}
    try:
        meta, summary, rows = opened.meta(), opened.summary(), read_rows(folder / "metrics.jsonl")
    except json.JSONDecodeError as error:
        raise ConfigError([(relative(folder), f"has a file that is damaged: {error}")], scope="this request") from None
    if lineage := meta.get("lineage"):
        values["fork.update"] = lineage["update"]
    return RunRecord(
        name=relative(folder.absolute()),
        values=values,
        seeds=seeds,
        status=status_of(folder.absolute(), summary),
        rows=rows,
        folder=folder.absolute(),
        run=run,
        meta=meta,
    )


# Reading a config takes a twentieth of a second, and a study has many that differ in nothing but their seeds: what decides a config
# beside them -> the config.
_READ: dict[tuple[str, str], RunConfig] = {}


def _load_config(path: Path) -> RunConfig:
    """The config in a file, without where it came from."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    values, _, origin = text.partition("\norigin:\n")
    seeds, shapes = SEED_NODE.search(values), SHAPES_NODE.search(origin)
    if seeds is None or shapes is None:
        return replace(load_config(path), origin=Origin())
    key = (values[: seeds.start()] + values[seeds.end() :], shapes[0])
    if key not in _READ:
        _READ[key] = replace(load_config(path), origin=Origin())
    return replace(_READ[key], seed=SeedConfig(**{name: int(value) for name, value in seeds.groupdict().items()}))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config by key path; the shape of a group under the group's own name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix.rstrip(".") if key == "type" and prefix else prefix + key] = value
    return found


def _sweep_of(path: Path) -> Path:
    """The folder that a sweep is named by, itself or by its summary.csv."""
    return path.parent if path.name == "summary.csv" else path


def in_order(records: list[RunRecord]) -> list[RunRecord]:
    """Runs by what differs between them, small values first: names of folders end in a hash, which orders nothing."""
    keys = [key for key in dict.fromkeys(key for record in records for key in record.values) if not _is_common(key, records)]

    def place(record: RunRecord) -> list[tuple[int, float, str]]:
        values = [record.values.get(key) for key in keys]
        return [(0, value, "") if isinstance(value, int | float) else (1, 0.0, str(value)) for value in values]

    return sorted(records, key=lambda record: (place(record), record.seed, record.name))


def _is_common(key: str, records: list[RunRecord]) -> bool:
    return all(record.values.get(key) == records[0].values.get(key) for record in records)


def _named(word: str, metric: str | None) -> tuple[list[Path], list[RunRecord]]:
    """(run folders, runs of a CSV) behind one word."""
    path = Path(word).expanduser()
    if path.is_file() and path.suffix.lower() == ".csv":
        return _read_table(path, word, metric)
    if path.is_dir():
        return _runs_in(path, word), []
    found = matches(word)
    if not found:
        instead = or_meant(path, "name runs (outputs/<name>/<run id>), a folder of runs, or a sweep")
        raise _refused(word, f"names no folder or CSV file; {instead}")
    if not has_magic(word):
        return _runs_in(found[0], word), []
    runs = [match for match in found if (match / "config.yaml").is_file()]
    inside = [run for match in found if match.is_dir() and match not in runs for run in _children(match)]
    if not runs and not inside:
        raise _refused(word, f"matches {len(found)} paths, but no run among them")
    return runs or inside, []


def _runs_in(path: Path, word: str) -> list[Path]:
    if (path / "config.yaml").is_file():
        return [path]
    if (path / "summary.csv").is_file():
        return _read_table(path / "summary.csv", word)[0]
    if runs := _children(path):
        return runs
    studies = sorted({config.parent.parent for config in path.glob("*/*/config.yaml")})
    if studies:
        raise _refused(word, f"holds no runs itself; name one of {', '.join(relative(study.absolute()) for study in studies[:8])}")
    raise _refused(word, "holds no run; name a run's folder (outputs/<name>/<run id>), a folder of runs, or a sweep's")


def _children(path: Path) -> list[Path]:
    """Runs directly inside a folder, without those that were moved aside for a fresh start."""
    return sorted(config.parent for config in path.glob("*/config.yaml") if not is_aside(config.parent))


def _read_table(path: Path, word: str, metric: str | None = None) -> tuple[list[Path], list[RunRecord]]:
    """A CSV: the runs that a sweep's summary names, or those of W&B's table."""
    lines = read_lines(path, word)
    if {"folder", "status"} <= lines[0].keys():
        return _of_sweep(path, lines, word), []
    results = result_columns(lines, metric)
    return [], [_of_line(line, number, path, results) for number, line in enumerate(lines, start=1)]


def _of_sweep(path: Path, lines: list[dict[str, str]], word: str) -> list[Path]:
    runs = [Path(line["folder"]) for line in lines if line["folder"]]
    # A sweep that was copied names where its runs were; they lie beside it all the same.
    here = [run if (run / "config.yaml").is_file() else path.parent.parent.parent / run.name for run in runs]
    # What was stopped early before it had begun has no run, and will have none.
    unbegun = {line["folder"] for line in lines if line["status"].startswith(STOPPED_EARLY)}
    begun = [(other / "config.yaml").is_file() or str(run) not in unbegun for run, other in zip(runs, here, strict=True)]
    runs, here = ([run for run, is_begun in zip(each, begun, strict=True) if is_begun] for each in (runs, here))
    missing = [run for run, other in zip(runs, here, strict=True) if not (other / "config.yaml").is_file()]
    if missing or not here:
        which = f"{len(missing)} of its {len(runs)} runs are not there, the first is {missing[0]}" if missing else "it names no run"
        raise _refused(word, f"is a sweep that cannot be compared: {which}; type the sweep's command again to make them")
    return here


def _of_line(line: Line, number: int, path: Path, results: Collection[str]) -> RunRecord:
    """A line of W&B's table of runs, where summary and config stand side by side.

    Args:
        results: columns that are no config.
    """
    values: dict[str, Any] = {}
    seeds: dict[str, int] = {}
    row: dict[str, Any] = {}
    for column, text in line.items():
        value = _read_cell(text)
        if is_about(column):
            continue
        if _is_seed(column):
            # Libraries write a column of whole numbers as 0.0, 1.0 where one of its cells is empty.
            if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
                seeds[column] = int(value)
        elif column in results:
            row[column] = value if not isinstance(value, float) or math.isfinite(value) else None
        elif column.partition(".")[0] not in OURS or column.partition(".")[0] in SCIENCE:
            values[column] = value
    about = {column.lower(): text for column, text in line.items() if is_about(column)}
    # A config may have a `name` as well; W&B's own columns begin with a capital.
    state = (line.get("State") or about.get("state") or "finished").lower()
    name = line.get("Name") or about.get("name") or f"{path.name} line {number + 1}"
    rows = [{key: value for key, value in row.items() if value != ""}]
    return RunRecord(name=name, values=values, seeds=seeds, status=state, rows=rows, line=f"{path} line {number + 1}")


def _is_seed(column: str) -> bool:
    return column in SEEDS or re.search(r"(^|[._-])seed$", column.lower()) is not None


def _read_cell(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _refused(subject: str, rule: str) -> ConfigError:
    return ConfigError([(subject, rule)], scope="this request")
