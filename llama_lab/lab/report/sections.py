"""What a report says, section by section, for every form that it is written in."""

import shlex
from collections.abc import Sequence

from llama_lab.config.schema import Problem, shown
from llama_lab.lab.compare.arms import Arm, unfinished_runs, updates_done
from llama_lab.lab.compare.diff import CONFIG, differences
from llama_lab.lab.compare.records import SEEDS, RunRecord
from llama_lab.lab.compare.study import BETTER, SAME, UNDECIDED, UNKNOWN, WORSE, Comparison, Study
from llama_lab.lab.compare.verdicts import (
    ARM_HEADINGS,
    TIME_HEADINGS,
    TIME_NOTE,
    VERDICT_HEADINGS,
    arm_cells,
    cells,
    footnote,
    headline,
    left_out,
    sentence,
)
from llama_lab.lab.report.blocks import Block, Fold, Lines, Prose, Section, Table
from llama_lab.lab.report.chart import COLOURS, COLUMNS
from llama_lab.lab.report.figures import Drawn, controls, curve_figure, difference_figure, names_of, order_of_colours
from llama_lab.lab.report.material import LOST, Material, arm_end, arm_last, counts, is_drawn, last_value, lost_rows
from llama_lab.lab.report.origin import cost_table, environment_table
from llama_lab.lab.report.parallel import parallel_figure
from llama_lab.lab.report.samples import sample_blocks

ORDER = (BETTER, WORSE, SAME, UNDECIDED, UNKNOWN)
MOST_SENTENCES = 5
MOST_COLUMNS = 6


def all_sections(material: Material, drawn: Sequence[Drawn]) -> list[Section]:
    """Every section that has something to say, in reading order."""
    found = [
        Section("answer", "Answer", _answer(material)),
        Section("sweep", "What was tried", _sweep(material)),
        Section("verdicts", "Verdicts", _verdicts(material)),
        Section("curves", "Curves", _curves(material, drawn)),
        Section("config", "What differs", _config(material)),
        Section("samples", "Samples", sample_blocks(material)),
        Section("cost", "Cost", cost_table(material)),
        Section("environment", "Environment", environment_table(material)),
        Section("runs", "Runs", _runs(material)),
    ]
    return [section for section in found if section.blocks]


def _answer(material: Material) -> list[Block]:
    study = material.study
    blocks: list[Block] = [*_without_verdict(material)] if study is None else [Prose([headline(study)]), *_said(study, material)]
    said = [] if study is None else [*study.notes, *left_out(study)]
    said += _lines(material.times_refused)
    if material.sweep is not None and material.sweep.missing:
        said += _lines(material.sweep.missing)
    if said:
        notes = Prose(said, "note")
        blocks.append(notes if len(said) <= MOST_SENTENCES else Fold(f"{len(said)} notes", [notes]))
    return blocks


def _without_verdict(material: Material) -> list[Block]:
    """What is said where nothing is compared."""
    if material.is_comparable and len(material.arms) == 1:
        return _one_config(material)
    lines = _lines(material.refused)
    blocks: list[Block] = [Prose(["No verdict: these runs cannot be compared as they are."], "answer")]
    if not material.is_comparable:
        blocks.append(
            Prose([f"Their values of {material.metric} do not mean the same, whatever a curve or a table shows side by side."])
        )
    blocks.append(Prose(lines[:MOST_SENTENCES], "wrong"))
    if len(lines) > MOST_SENTENCES:
        blocks.append(Fold(f"{len(lines) - MOST_SENTENCES} more reasons", [Prose(lines[MOST_SENTENCES:], "wrong")]))
    return blocks


def _one_config(material: Material) -> list[Block]:
    """What is said of seeds alone: of those that are trained to their end."""
    metric, runs = material.metric, [run for run in material.runs if run.is_finished or run.folder is None]
    values = [value for run in runs if (value := last_value(run, metric)) is not None]
    if not values and any(lost_rows(run) for run in runs):
        said = f"No run of this config is finished whose {metric} is known."
    elif not values:
        said = f"No run of this config is finished with a finite {metric}."
    elif len(values) == 1:
        said = f"One finished run: {metric} {values[0]:.4f}. One seed does not say how far another would end."
    else:
        said = f"One config with {len(values)} finished seeds: {metric} {min(values):.4f} to {max(values):.4f}."
    blocks: list[Block] = [Prose([said, "There is no other config to compare it with."], "answer")]
    left = _lines(unfinished_runs(material.runs))
    unknown = [run for run in runs if last_value(run, metric) is None]
    left += [f"{run.name} {LOST}." if lost_rows(run) else f"{run.name} ended with no finite {metric}." for run in unknown]
    return [*blocks, Prose(left, "wrong")] if left else blocks


def _said(study: Study, material: Material) -> list[Block]:
    """The verdicts in words; of many arms first those that are decided."""
    found = sorted(study.comparisons, key=lambda one: ORDER.index(one.verdict))
    if len(found) <= MOST_SENTENCES:
        return [Prose([_stopped(sentence(study, one)) for one in found], "answer")]
    lines = [_stopped(sentence(study, one)) for one in found]
    shown_lines = [line for line, one in zip(lines, found, strict=True) if one.verdict == BETTER][:MOST_SENTENCES]
    return [
        Prose([_counted(study, found), *shown_lines, *_leader(study, material)], "answer"),
        Fold(f"All {len(lines)} comparisons in words", [Prose(lines)]),
    ]


def _counted(study: Study, found: Sequence[Comparison]) -> str:
    baseline = study.arms[0].label
    counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in ORDER}
    if counts[UNKNOWN] == len(found):
        return (
            f"Which of {len(study.arms)} configs is better cannot be said: a single seed does not tell how much of a difference is "
            f"chance. Two seeds each are the least, five are usual; llama-lab noise measures what one seed hides."
        )
    words = {
        BETTER: "better",
        WORSE: "worse",
        SAME: "not worth a difference",
        UNDECIDED: "undecided",
        UNKNOWN: "without a second seed",
    }
    said = ", ".join(f"{counts[verdict]} {words[verdict]}" for verdict in ORDER if counts[verdict])
    return f"Of {len(found)} arms beside {baseline}: {said}."


def _leader(study: Study, material: Material) -> list[str]:
    """Which arm looks best where that is not decided; that it does is no verdict."""
    if not any(one.verdict in (UNDECIDED, UNKNOWN) for one in study.comparisons):
        return []
    ends = {arm.label: sum(values) / len(values) for arm in study.arms if (values := study.of(arm))}
    best = min(ends, key=lambda label: (-ends[label] if material.higher_is_better else ends[label], label))
    most = "Highest" if material.higher_is_better else "Lowest"
    return [
        f"{most} {study.metric}: {ends[best]:.4f}, {best}. The best of {len(ends)} looks better than it is: chance chose it too."
    ]


def _verdicts(material: Material) -> list[Block]:
    study = material.study
    if study is None:
        return []
    number = _line_numbers(material)
    arms = Table(
        headline(study),
        ARM_HEADINGS,
        [arm_cells(study, arm) for arm in study.arms],
        words=(0, 4),
        arms=[number[arm.label] for arm in study.arms],
    )
    against = Table(
        f"Against {study.arms[0].label}",
        VERDICT_HEADINGS,
        [[one.arm.label, *cells(study, one)] for one in study.comparisons],
        words=(0, 5),
        arms=[number[one.arm.label] for one in study.comparisons],
    )
    if all(one.verdict == UNKNOWN for one in study.comparisons) and len(study.comparisons) > MOST_SENTENCES:
        return [Fold(f"Differences of {len(study.arms)} single runs, of which nothing can be said", [against, arms])]
    blocks: list[Block] = []
    if (figure := difference_figure(study)) is not None:
        blocks.append(figure)
    blocks += [against, Prose([f"{said}."])] if (said := footnote(study)) else [against]
    blocks.append(arms)
    if material.times is not None:
        target, rows = material.times
        blocks.append(Table(f"To {study.metric} {target:.4f}, against {study.arms[0].label}", TIME_HEADINGS, rows, words=(0, 1, 7)))
        blocks.append(Prose([f"{TIME_NOTE}."]))
    return blocks


def _curves(material: Material, drawn: Sequence[Drawn]) -> list[Block]:
    names, brief = names_of(material)
    higher = material.higher_is_better
    if not drawn:
        return [Prose(["There are no curves: the runs have no rows of metrics, or come from a table of last values."], "note")]
    said = [
        "The line is the mean of an arm's seeds, the band reaches from the lowest to the highest of them. Where a curve has more "
        f"points than a picture shows, the line is the mean of each of {COLUMNS} columns, and the band holds every value in it."
    ]
    if len(names) > COLOURS:
        lower = "highest" if higher else "lowest"
        said.append(
            f"{COLOURS} of {len(names)} arms have a colour: {names[0]}, and those with the {lower} {material.metric}; "
            "the others are grey."
        )
    notes = _gaps(material) + _short_seeds(material)
    blocks: list[Block] = (
        []
        if material.is_comparable
        else [Prose([f"{material.metric} does not mean the same in these runs; see the answer."], "wrong")]
    )
    blocks += [
        controls(drawn, names),
        *(curve_figure(one, names, brief, higher_is_better=higher) for one in drawn),
    ]
    blocks.append(Prose(said))
    if notes:
        blocks.append(Prose(notes, "note"))
    values = _values_table(material, drawn[0], names)
    return [*blocks, Fold(f"{drawn[0].metric} as a table", [values])]


def _gaps(material: Material) -> list[str]:
    """Runs whose curves have places without a finite number."""
    found = []
    for run in material.runs:
        for metric in dict.fromkeys((material.metric, "train/loss")):
            rows = [row for row in run.rows if metric in row]
            if lost := [row for row in rows if row[metric] is None]:
                where = f"first after {lost[0].get('tokens', 0):,} tokens"
                found.append(
                    f"{run.name}: {len(lost)} of {len(rows)} values of {metric} are no finite numbers, {where}: a gap, marked ×."
                )
    return found


def _short_seeds(material: Material) -> list[str]:
    """Arms whose seeds have come differently far, and runs that nothing can be drawn of."""
    found = [
        f"{run.name}: has no metrics yet, and so no curve." for run in material.runs if run.folder is not None and not run.rows
    ]
    for arm in material.arms:
        there = [run for run in arm.runs if run.rows]
        drawn = [run for run in there if run.folder is None or is_drawn(run, arm)]
        if len(drawn) < len(there):
            seeds = ", ".join(run.seed_said for run in there if run not in drawn)
            found.append(f"{arm.label}: its curve is without seed {seeds}, which was stopped early.")
        ends = {max((row["tokens"] for row in run.rows if "tokens" in row), default=0) for run in drawn}
        if len(ends) > 1:
            found.append(
                f"{arm.label}: its seeds have come to {min(ends):,} to {max(ends):,} tokens; its curve ends with the shortest."
            )
    return found


def _values_table(material: Material, drawn: Drawn, names: Sequence[str]) -> Table:
    """The first metric at a few places: what the picture shows, for those who do not see it."""
    axis, curves = next(iter(drawn.by_axis.items()))
    start, end = max(float(series.places[0]) for _, series in curves), min(float(series.places[-1]) for _, series in curves)
    shared = sorted(set.intersection(*(set(series.places.tolist()) for _, series in curves)))
    # The first measured place is where the curves begin, wherever that is.
    wanted = [start, *(end * share for share in (0.05, 0.1, 0.25, 0.5, 0.75, 1.0) if end * share > start)] if start < end else [end]
    if shared and len(shared) <= MOST_COLUMNS:
        wanted = shared
    elif shared:
        wanted = list(dict.fromkeys(min(shared, key=lambda place: abs(place - one)) for one in wanted))
    rows = []
    for arm, series in sorted(curves, key=lambda curve: curve[0]):
        nearest = [int(abs(series.places - place).argmin()) for place in wanted]
        rows.append([names[arm], *[f"{series.middle[index]:.4f}" for index in nearest]])
    headings = ["arm", *[f"{place:,.0f}" for place in wanted]]
    arms = [arm for arm, _ in sorted(curves, key=lambda curve: curve[0])]
    where = "after" if shared else "at the measured place nearest to"
    return Table(f"{drawn.metric} {where} so many {axis}", headings, rows, arms=arms)


def _sweep(material: Material) -> list[Block]:
    figure = parallel_figure(material)
    if material.sweep is None:
        return [figure] if figure is not None else []
    keys = [key for key in material.sweep.keys if any(key in values for values in material.sweep.values.values())]
    number = _line_numbers(material)
    rows, arms = [], []
    for index in material.ranked():
        arm = material.arms[index]
        first = next((run.folder for run in arm.runs if run.folder in material.sweep.values), None)
        typed = material.sweep.values.get(first, {}) if first is not None else {}
        end, last = arm_end(arm, material.metric), arm_last(arm, material.metric)
        states = ", ".join(dict.fromkeys(run.status for run in arm.runs))
        ended = "" if end is None else f"{end:.4f}"
        if end is None and last is not None:
            ended, states = f"{last[1]:.4f}", f"{states}; {material.metric} after update {last[0]}"
        place = str(len(rows) + 1) if end is not None and material.is_comparable else ""
        done = sum(map(counts, arm.runs))
        rows.append([place, *[typed.get(key, "") for key in keys], str(done or ""), ended, states])
        arms.append(number[arm.label])
    words = [column for column, key in enumerate(keys, start=1) if not all(_is_number(row[column]) for row in rows)]
    caption = f"What was tried, by the mean {material.metric} of the runs that finished, the best first"
    if not material.is_comparable:
        caption = f"What was tried, in its order: values of {material.metric} rank nothing here, see the answer"
    table = Table(
        caption,
        ["rank", *keys, "finished", material.metric, "status"],
        rows,
        words=(*words, len(keys) + 3),
        arms=arms,
    )
    return [*([figure] if figure is not None else []), table]


def _config(material: Material) -> list[Block]:
    """What tells the arms apart, in their configs and beyond."""
    if len(material.arms) < 2:
        return []
    keys = list(dict.fromkeys(key for arm in material.arms for key in arm.values))
    keys = [key for key in keys if len({shown(arm.values.get(key, "-")) for arm in material.arms}) > 1]
    number = _line_numbers(material)
    caption = "Config of the arms: what differs"
    blocks: list[Block] = []
    if keys and len(material.arms) <= MOST_COLUMNS:
        headings = ["key", *[arm.label for arm in material.arms]]
        rows = [[key, *[shown(arm.values.get(key, "-")) for arm in material.arms]] for key in keys]
        blocks.append(Table(caption, headings, rows, words=range(len(headings))))
    elif keys:
        rows = [[arm.label, *[shown(arm.values.get(key, "-")) for key in keys]] for arm in material.arms]
        table = Table(caption, ["arm", *keys], rows, words=range(len(keys) + 1), arms=[number[arm.label] for arm in material.arms])
        blocks.append(Fold(f"Config of {len(rows)} arms", [table]))
    if beyond := _beyond(material):
        headings = ["arm", "of", "what", "baseline", "arm has"]
        blocks.append(
            Table(f"What else differs from {material.arms[0].label} and can move a curve", headings, beyond, words=range(5))
        )
    else:
        blocks.append(Prose(["Code, data, versions and machine are the same, as far as they can move a curve."]))
    return blocks


def _beyond(material: Material) -> list[list[str]]:
    """Differences outside the config between two runs, of the same seed where there are such, of each arm and the baseline."""
    rows = []
    for arm in material.arms[1:]:
        pair = _pair(material.arms[0], arm)
        if pair[0].run is None or pair[1].run is None:
            continue
        found = [one for one in differences(*pair) if one.matters and one.part != CONFIG]
        rows += [[arm.label, one.part, one.what, one.a, one.b] for one in found]
    return rows


def _pair(baseline: Arm, arm: Arm) -> tuple[RunRecord, RunRecord]:
    theirs = {run.seed: run for run in arm.runs}
    return next(((run, theirs[run.seed]) for run in baseline.runs if run.seed in theirs), (baseline.runs[0], arm.runs[0]))


def _runs(material: Material) -> list[Block]:
    number = _line_numbers(material)
    rows, arms, commands = [], [], []
    seed_heading, seeds = _seeds(material.runs)
    for arm in material.arms:
        for run in arm.runs:
            last = run.rows[-1] if run.rows else {}
            value = last_value(run, material.metric)
            end = (
                f"{value:.4f}" if value is not None else "" if not any(material.metric in row for row in run.rows) else "not finite"
            )
            tokens = f"{last['tokens']:,}" if isinstance(last.get("tokens"), int) else ""
            seconds = f"{last['seconds']:,.0f}" if isinstance(last.get("seconds"), int | float) else ""
            done = f"{updates_done(run):,}" if "update" in last else ""
            rows.append([run.name, arm.label, seeds[len(rows)], run.status, done, tokens, end, seconds])
            arms.append(number[arm.label])
            if run.meta.get("command"):
                commands.append(shlex.join(run.meta["command"]))
    headings = ["run", "arm", seed_heading, "status", "update", "tokens", material.metric, "seconds"]
    caption = "Folders below outputs/, and what each ended with"
    if not material.is_comparable:
        caption += f"; values of {material.metric} cannot be compared, see the answer"
    blocks: list[Block] = [Table(caption, headings, rows, words=(0, 1, 2, 3), arms=arms)]
    if commands:
        commands = list(dict.fromkeys(commands))
        said = "Commands that made them" if len(commands) > 1 else "The command that made them"
        blocks.append(Fold(said, [Lines(said, commands)]))
    return [*blocks, Prose(["This report was made by:"]), Lines("The command of this report", [shlex.join(material.command)])]


def _seeds(runs: Sequence[RunRecord]) -> tuple[str, list[str]]:
    """A heading, and the seeds of each run: one number where each run has but one, else all of them in the same order."""
    own = [[run.seeds[key] for key in SEEDS if key in run.seeds] for run in runs]
    if all(len(set(seeds)) <= 1 for seeds in own):
        return "seed", [run.seed_said for run in runs]
    names = "/".join(key.rpartition(".")[2] for key in SEEDS)
    return f"seed ({names})", ["/".join(map(str, seeds)) if seeds else run.seed_said for seeds, run in zip(own, runs, strict=True)]


def _line_numbers(material: Material) -> dict[str, int]:
    """Label of each arm -> number of its colour."""
    return {material.arms[number].label: place for place, number in enumerate(order_of_colours(material))}


def _lines(problems: Sequence[Problem]) -> list[str]:
    return [_stopped(f"{subject} {rule}") for subject, rule in problems]


def _stopped(text: str) -> str:
    """A sentence with its full stop."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
