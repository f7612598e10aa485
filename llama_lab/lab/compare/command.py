"""`llama-lab compare`: what it makes of the words after it, and what it prints."""

import argparse

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.lab.compare.arms import group_arms
from llama_lab.lab.compare.question import RUNS_HELP, add_question, baseline_first, read_loss, read_question
from llama_lab.lab.compare.records import load_records
from llama_lab.lab.compare.study import Study, compare_arms
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
    times_to_loss,
)
from llama_lab.lab.table import print_table


def run_compare_command(words: list[str]) -> int:
    """Compare runs and print the verdicts.

    Args:
        words: what follows `compare` on the command line.

    Returns:
        The exit code: 0 compared, 2 not understood.

    Raises:
        ConfigError: the runs cannot be found or compared, with the reasons; or, after the verdicts, a loss that was named was not
            seen in all of them.
    """
    try:
        asked = _parser().parse_intermixed_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    question = read_question(asked)
    arms = baseline_first(group_arms(load_records(asked.runs, metric=asked.metric), asked.ignore), asked.baseline)
    study = compare_arms(arms, question)
    target = None if asked.to_loss is None else read_loss(asked.to_loss)
    _show(study)
    if asked.to_loss is None:
        return 0
    try:
        times = times_to_loss(study, target)
    except ConfigError as error:
        if target is not None:
            raise
        # The verdicts stand without it.
        print("\n".join(["", "What a loss takes cannot be said:", *(f"  {subject} {rule}" for subject, rule in error.problems)]))
        return 0
    _show_times(study, *times)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab compare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Which config is better, by how much, and how sure. Runs that differ only in seed are one arm; arms are\n"
        "paired by seed; every arm is compared with the first.\n\n"
        "  llama-lab compare outputs/study                      every run in a folder\n"
        "  llama-lab compare 'outputs/study/*wsd*' 'outputs/study/*cosine*'\n"
        "  llama-lab compare outputs/study/sweeps/schedule-1f2e --at flops --to-loss\n"
        "  llama-lab compare wandb_export.csv --metric eval/accuracy --higher",
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help=RUNS_HELP)
    add_question(parser)
    return parser


def _show(study: Study) -> None:
    print_table(headline(study), ARM_HEADINGS, [arm_cells(study, arm) for arm in study.arms])
    print()
    lines = [(one.arm.label, *cells(study, one)) for one in study.comparisons]
    print_table(f"Against {study.arms[0].label}", VERDICT_HEADINGS, lines)
    if said := footnote(study):
        print(f"  {said}")
    print()
    for one in study.comparisons:
        print(sentence(study, one))
    for note in (*left_out(study), *study.notes):
        print(f"Note: {note}")


def _show_times(study: Study, target: float, rows: list[list[str]]) -> None:
    print()
    print_table(f"To {study.metric} {target:.4f}, against {study.arms[0].label}", TIME_HEADINGS, rows)
    print(f"  {TIME_NOTE}")
