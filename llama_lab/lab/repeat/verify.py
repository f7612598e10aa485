"""`llama-lab verify`: whether a run's files are what was written, and whether this machine, with this code, makes the run again."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.identity import load_config
from llama_lab.config.schema import RunConfig
from llama_lab.lab.repeat.rows import Rows, check_asked, first_update
from llama_lab.lab.table import print_table
from llama_lab.training.run_folder import RunFolder, find_run, relative

if TYPE_CHECKING:
    from llama_lab.lab.repeat.checks import Check

UPDATES = 3
MARKS = {True: "ok", False: "FAILED", None: "-"}


def run_verify_command(words: list[str]) -> int:
    """Check a run, or make one of its updates again. Nothing is written into its folder, which may be in use.

    Args:
        words: what follows `verify` on the command line.

    Returns:
        The exit code: 0 everything that can be compared is equal or within float noise, 1 it is not, 2 not understood.

    Raises:
        ConfigError: there is no such run or update, or an update was asked for whose data cannot be opened.
    """
    try:
        asked = _parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    folder = find_run(asked.run)
    if not folder.meta():
        rule = "has no meta.json, so it is not known what it was made with; copy the run again as a whole"
        raise ConfigError([(str(asked.run), rule)], scope="this request")
    run = load_config(folder.path / "config.yaml")
    check_asked(run, folder, updates=asked.updates, update=asked.update)
    if asked.update is not None:
        from llama_lab.lab.repeat.reproduce import show_update

        return 0 if show_update(run, folder, asked.update) else 1
    checks = list(_checks(run, folder, updates=asked.updates, read_all=asked.data, validate_all=asked.validation))
    print_table(f"Checks of {relative(folder.path)}", ("check", "", "found"), [(c.name, MARKS[c.passed], c.said) for c in checks])
    print(_verdict(checks))
    return 1 if any(check.passed is False for check in checks) else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab verify",
        description="Check every file of a run, and make its first updates again: does this machine reproduce it? Writes nothing.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, outputs/<name>/<run id>")
    which = parser.add_mutually_exclusive_group()
    more = f"default: {UPDATES}, and up to the first row and checkpoint behind them where that is quick"
    which.add_argument("--updates", type=_number, metavar="N", help=f"make the first N updates again ({more})")
    which.add_argument("--update", type=_number, metavar="N", help="make update N again, and show its loss and gradient norms")
    parser.add_argument("--data", action="store_true", help="compare every file of the data with its checksum, and every batch")
    parser.add_argument(
        "--validation", action="store_true", help="validate every checkpoint again (default: as many as take half a minute)"
    )
    return parser


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of updates; try {UPDATES}")
    return int(text)


def _checks(run: RunConfig, folder: RunFolder, *, updates: int | None, read_all: bool, validate_all: bool) -> "Iterator[Check]":
    """Every check, the quick ones first."""
    from llama_lab.lab.repeat import checks, reproduce
    from llama_lab.training.run_data import open_data, trained_on

    rows, here = Rows.of(folder), reproduce.find_here(run, folder)
    span = reproduce.choose_span(run, folder, rows, here, updates=updates, least=UPDATES)
    yield checks.check_identity(run, folder)
    yield checks.check_code(folder, here.origin)
    yield checks.Check("hardware", None if here.other else True, here.other or f"as it was: {here.place}")
    yield checks.check_rows(run, folder, rows)
    yield checks.check_checkpoints(folder)
    try:
        data = open_data(run, folder, print)
    except ConfigError as error:
        yield checks.Check("data", False, "; ".join(f"{subject} {rule}" for subject, rule in error.problems))
        yield checks.Check("updates", None, "cannot be made again without the data")
        return
    yield checks.check_data(data, folder, read_all=read_all)
    if data.fingerprint != trained_on(folder):
        yield checks.Check("updates", None, "are not made again: they would be fed something else")
        return
    yield reproduce.compare_validations(folder, data, rows, here, every=validate_all)
    yield checks.check_batches(run, data, rows, after=first_update(folder), last=span.last, read_all=read_all)
    yield from reproduce.compare(folder, data, rows, here, span)


def _verdict(checks: "list[Check]") -> str:
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        return f"NOT VERIFIED: {', '.join(failed)}"
    if not any(check.passed and check.reproduces for check in checks):
        return "Verified as far as it can be: the run is whole, and has kept nothing that an update could be compared with"
    if all(check.is_exact for check in checks):
        return "Verified: the run is whole, and this machine reproduces it bit for bit"
    return "Verified: the run is whole, and this machine agrees with it within float noise"
