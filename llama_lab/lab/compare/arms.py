"""Runs that differ only in seed as one arm of a study, and whether arms may be compared at all."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Problem, shown
from llama_lab.lab.compare.csv_table import PROGRESS
from llama_lab.lab.compare.records import SEEDS, RunRecord
from llama_lab.lab.labels import differences_of
from llama_lab.training.run_folder import RunFolder

LOSS, BITS, TRAINING_LOSS = "val/loss", "val/bits_per_byte", "train/loss"
CONTENT = "data.content"
"""Start of the fingerprint of a run's data, where that differs between runs of one config."""
CONTENT_CHARACTERS = 8
# What a table has of how long a run was trained, where it does not have its tokens.
LENGTHS = ("_step", "trainer/global_step", "global_step", "step", "update")
INIT, ORDER = SEEDS[:2]
EVALUATE = "no metric can be compared between them; llama-lab evaluate RUN TEXT measures each on one text"
WHOLE = "llama-lab evaluate RUN measures each on all of it, as eval.max_tokens=null does in training"
FEEDING = ("data.max_seq_len", "data.tokens_per_update", "data.window", "data.weights")
"""What of the data changes how text is fed, not which text it is."""


@dataclass(frozen=True)
class Arm:
    """Runs of one config with different seeds.

    Attributes:
        label: what tells it from the other arms.
        values: key path -> value of everything that decides its curves.
        runs: in the order of their seeds.
    """

    label: str
    values: dict[str, Any]
    runs: tuple[RunRecord, ...]

    @property
    def seeds(self) -> list[tuple[int, ...]]:
        """Seed of each run."""
        return [run.seed for run in self.runs]


def group_arms(records: Sequence[RunRecord], ignore: Sequence[str] = ()) -> list[Arm]:
    """The arms that runs form, in the order in which they first come. A repeat is left out where the run that it repeats is there.

    Args:
        ignore: key paths that are taken to make no difference.

    Raises:
        ConfigError: two runs of an arm have the same seeds, or a key to ignore is in no config.
    """
    records = _by_content(records)
    lengths = [key for key in LENGTHS if any(key in row for record in records if record.folder is None for row in record.rows)]
    known = {key for record in records for key in record.values} | {*lengths}
    if unknown := [key for key in ignore if key not in known]:
        rule = "is in no config of these runs; give its whole path, such as data.path"
        raise _refused([(f"--ignore {key}", rule) for key in unknown])
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        kept = {key: value for key, value in record.values.items() if key not in ignore}
        own = replace(record, values=kept)
        if record.folder is None:
            own = replace(own, rows=[{key: value for key, value in row.items() if key not in ignore} for row in record.rows])
        groups.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(own)
    groups = {key: _without_repeats(group) for key, group in groups.items()}
    if twins := [problem for group in groups.values() for problem in _twins(group)]:
        raise _refused(twins)
    labels = _labels([group[0].values for group in groups.values()])
    return [
        Arm(label, group[0].values, tuple(sorted(group, key=lambda run: run.seed)))
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def _by_content(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs; those of one data config that were trained on unequal tokens all the same are told apart by them."""
    prints: dict[str, set[str]] = {}
    configs = [json.dumps({key: run.values[key] for key in sorted(run.values) if _is_data(key)}, default=str) for run in records]
    known = [(run.meta.get("data") or {}).get("data") for run in records]
    for config, content in zip(configs, known, strict=True):
        prints.setdefault(config, set()).update(() if content is None else (str(content),))
    return [
        run
        if content is None or len(prints[config]) == 1
        else replace(run, values=run.values | {CONTENT: str(content)[:CONTENT_CHARACTERS]})
        for run, config, content in zip(records, configs, known, strict=True)
    ]


def _is_data(key: str) -> bool:
    return key.partition(".")[0] in ("data", "tokenizer")


def choose_metric(arms: Sequence[Arm], asked: str | None) -> str:
    """The metric that all runs of the arms can be compared by: the one asked for, else the loss, else bits per byte.

    Raises:
        ConfigError: there is none, with the reason: runs without it, another validation text, another tokenizer.
    """
    metric = asked or LOSS
    runs = [run for arm in arms for run in arm.runs]
    if asked is None and len(set(_tokenizers(runs))) > 1:
        metric = BITS
    problems = _missing(runs, metric, is_asked=asked is not None) or _incomparable(runs, metric)
    if problems:
        raise _refused(problems)
    return metric


def unfinished_runs(runs: Sequence[RunRecord]) -> list[Problem]:
    """What is not trained to its end, and how far it is."""
    found: list[Problem] = []
    for run in runs:
        if not run.is_finished:
            done, of = updates_done(run), f" of {run.run.updates}" if run.run is not None else ""
            far = "" if done is None else f"update {done}{of}"
            said = f"is not finished ({', '.join(filter(None, (run.status, far)))})"
            found.append((run.name, f"was stopped early, after {far}" if run.is_stopped_early else said))
    return found


def updates_done(run: RunRecord) -> int | None:
    """Updates that a run has done, as it says itself: its rows are of those that were logged. None if a table does not say."""
    done = max((row["update"] for row in run.rows if "update" in row), default=None)
    if run.folder is None or not run.rows:
        return done if run.run is None else done or 0
    return max(done or 0, RunFolder(run.folder).summary().get("update", 0))


def notes(arms: Sequence[Arm]) -> list[str]:
    """What a reader should know about runs that may be compared all the same."""
    found: list[str] = []
    for arm in arms:
        if (codes := _codes(arm.runs)) > 1:
            found.append(f"{arm.label}: its runs were made with {codes} versions of the code; llama-lab diff shows them")
    runs = [run for arm in arms for run in arm.runs]
    if _codes(runs) > 1 and not found:
        found.append("the arms were made with different versions of the code; llama-lab diff shows what changed")
    if len({run.run.data.max_seq_len for run in runs if run.run is not None}) > 1:
        found.append("the contexts are of different length: a longer one alone lowers the loss on the same text")
    if any(CONTENT in run.values for run in runs):
        changed = "data changed between runs of one config: those are arms of their own"
        found.append(f"{changed}, told apart by {CONTENT}, the start of its fingerprint; --ignore {CONTENT} makes them one")
    found += _one_seed(arms)
    if any(run.folder is None for run in runs):
        found += _all_apart(arms)
        found.append("a CSV does not say what its runs were validated on; it is taken to be the same text")
    return found


def _codes(runs: Sequence[RunRecord]) -> int:
    """How many versions of the code runs say that they were made with."""
    return len({(run.meta.get("code") or {}).get("sha256") for run in runs} - {None})


def _all_apart(arms: Sequence[Arm]) -> list[str]:
    """The columns of a table that make each of its runs an arm of its own, though there are seeds to tell runs apart."""
    runs = [run for arm in arms for run in arm.runs]
    if len(runs) > len(arms) or len({run.seed for run in runs}) < 2:
        return []
    keys = [key for key in runs[0].values if len({str(run.values.get(key)) for run in runs}) == len(runs)]
    # With two runs, whatever differs does.
    if len(runs) < 3 or not keys:
        return []
    each = f"every run has another {', '.join(keys)}, so that none of them form an arm"
    return [f"{each}; {' '.join(f'--ignore {key}' for key in keys)} if that makes no difference"]


def _one_seed(arms: Sequence[Arm]) -> list[str]:
    """That a seed which all runs have in common, or all of an arm, was not varied: its chance is in none of the intervals."""
    for key, other, what in ((ORDER, INIT, "order of the data"), (INIT, ORDER, "draw of the initial weights")):
        seeds = [{run.seeds.get(key) for run in arm.runs} for arm in arms]
        is_varied = any(len({run.seeds.get(other) for run in arm.runs}) > 1 for arm in arms)
        if not is_varied or any(None in own or len(own) > 1 for own in seeds):
            continue
        everywhere = set[int | None]().union(*seeds)
        if len(everywhere) == 1:
            return [f"every run has {key}={everywhere.pop()}: what is said holds for this one {what}, others may differ"]
        return [f"every arm has one {key} alone, and not the same: that one {what} may make a difference which is not the arm's"]
    return []


def _without_repeats(group: list[RunRecord]) -> list[RunRecord]:
    """Runs of one config without those that repeat another of them."""
    own = {run.seed for run in group if not run.is_repeat}
    return [run for run in group if not (run.is_repeat and run.seed in own)]


def _twins(group: list[RunRecord]) -> list[Problem]:
    """Runs of one config with the same seeds."""
    seen: dict[tuple[int, ...], RunRecord] = {}
    found: list[Problem] = []
    for run in group:
        if not run.seed:
            continue
        other = seen.setdefault(run.seed, run)
        if other is run:
            continue
        rule = f"has the config and the seed ({run.seed_said}) of {other.name}"
        same = run.folder is not None and other.folder is not None and run.folder.name == other.folder.name
        rule += ": one run in two places; name one of them" if same else "; a seed counts once, so leave one of them out"
        found.append((run.name, rule))
    return found


def _labels(configs: list[dict[str, Any]]) -> list[str]:
    """A name for each arm, of what differs between their configs."""
    labels = differences_of(configs)
    if not any(labels):
        return [f"arm {number}" for number in range(1, len(configs) + 1)] if len(configs) > 1 else ["all runs"]
    if len(set(labels)) < len(labels):
        labels = [f"{label} #{number}" for number, label in enumerate(labels, start=1)]
    return labels


def _missing(runs: list[RunRecord], metric: str, *, is_asked: bool) -> list[Problem]:
    found: list[Problem] = []
    known = sorted({key for run in runs for key in run.metrics if not key.startswith("_") and key not in PROGRESS})
    if known and metric not in known and not is_asked:
        losses = sorted((key for key in known if "loss" in key), key=lambda key: "val" not in key)
        other = TRAINING_LOSS if TRAINING_LOSS in known else next(iter(losses), known[0])
        rule = "was measured in none of these runs: train them as far as a validation, or"
        if all(run.folder is None for run in runs):
            rule = "is no column of this table;"
        return [(metric, f"{rule} --metric {other} compares by that")]
    if known and metric not in known:
        close = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        return [(f"--metric {metric}", f"was measured in none of these runs; {hint}")]
    if not known and all(run.folder is None for run in runs):
        rule = "is no column of this table; its metrics are the columns with a / in their names, and those called loss or the like"
        return [(f"--metric {metric}" if is_asked else metric, rule)]
    for run in runs:
        if not run.rows:
            found.append((run.name, "has no metrics yet; train it, or leave it out"))
        elif not any(metric in row for row in run.rows):
            found.append((run.name, f"has no {metric}, which others have; leave it out"))
    return found


def _incomparable(runs: list[RunRecord], metric: str) -> list[Problem]:
    """Why values of the metric mean different things."""
    first = runs[0]
    if not metric.startswith(("val/", "train/loss", "train/perplexity")):
        return []
    tokenizers = _tokenizers(runs)
    if len(set(tokenizers)) > 1 and not metric.endswith("bits_per_byte"):
        other = next(run for run, own in zip(runs, tokenizers, strict=True) if own != tokenizers[0])
        rule = f"has another tokenizer than {first.name}: a nat a token is not the same for both"
        if metric.startswith("val/"):
            partly = next((f"{run.name} {reason}" for run in runs if (reason := _other_text(first, run, BITS))), None)
            rule += f"; --metric {BITS} can be compared" if partly is None else f", and {BITS} neither: {partly}"
        return [(other.name, rule)]
    found: list[Problem] = []
    for run in runs[1:]:
        if reason := _other_text(first, run, metric):
            found.append((run.name, reason))
    return found


def _other_text(first: RunRecord, run: RunRecord, metric: str) -> str | None:
    """Why two runs were not measured on the same text; None if they were."""
    if first.run is None or run.run is None:
        return _other_text_by_values(first, run)
    same_data = first.meta.get("data", {}).get("data") == run.meta.get("data", {}).get("data")
    if metric.startswith("train/"):
        return None if same_data else f"was trained on other data than {first.name}, so their training losses say nothing together"
    asked = [None if record.run.eval is None else record.run.eval.max_tokens for record in (first, run) if record.run is not None]
    texts = [record.meta.get("validation") for record in (first, run)]
    whole = WHOLE if same_data or (None not in texts and texts[0] == texts[1]) else EVALUATE
    if asked[0] != asked[1]:
        return f"was validated on eval.max_tokens={shown(asked[1])}, {first.name} on {shown(asked[0])}: not the same text; {whole}"
    if same_data:
        return None
    if None in texts:
        why = "and it is not recorded that both were validated on the same text"
        return f"was trained on other data ({_told(run, first)}) than {first.name} ({_told(first, run)}), {why}; {EVALUATE}"
    if texts[0] != texts[1]:
        return f"was validated on another text ({_told(run, first)}) than {first.name} ({_told(first, run)}); {EVALUATE}"
    if asked[0] is not None and len(set(_tokenizers([first, run]))) > 1:
        said = f"was validated on eval.max_tokens={asked[0]} of another tokenizer than {first.name}, which is not the same text"
        return f"{said}; {whole}"
    return None


def _told(run: RunRecord, other: RunRecord) -> str:
    """Where a run's text comes from, as far as that is not where another's does."""
    keys = [key for key in run.values if key.partition(".")[0] == "data" and key not in (*FEEDING, CONTENT)]
    own = [f"{key}={shown(run.values[key])}" for key in keys if run.values[key] != other.values.get(key, ...)]
    return " ".join(own[:2]) or "the same files with other content"


def _other_text_by_values(first: RunRecord, run: RunRecord) -> str | None:
    """The same from configs alone, as a CSV has them."""
    keys = [key for key in {*first.values, *run.values} if key.partition(".")[0] == "data" and key not in FEEDING]
    differing = sorted(key for key in keys if first.values.get(key) != run.values.get(key))
    if not differing:
        return None
    why = f"has another {differing[0]} than {first.name}, so it was hardly validated on the same text"
    return f"{why}; --ignore {differing[0]} if it was"


def _tokenizers(runs: list[RunRecord]) -> list[str]:
    """What stands for the tokenizer of each run: its hash; what their configs say of it where one comes from a table."""
    if all(run.folder is not None for run in runs):
        return [str(run.meta.get("data", {}).get("tokenizer")) for run in runs]
    kinds = [{key: value for key, value in run.values.items() if key.partition(".")[0] == "tokenizer"} for run in runs]
    return [json.dumps(kind, sort_keys=True) for kind in kinds]


def together(problems: Sequence[Problem]) -> list[Problem]:
    """Problems with one line for what is wrong in the same way with several runs."""
    names: dict[str, list[str]] = {}
    for name, rule in problems:
        names.setdefault(rule, []).append(name)
    return [(own[0] + (f" (and {len(own) - 1} more)" if len(own) > 1 else ""), rule) for rule, own in names.items()]


def _refused(problems: list[Problem]) -> ConfigError:
    return ConfigError(together(problems), scope="this comparison")
