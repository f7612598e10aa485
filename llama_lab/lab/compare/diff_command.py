"""`llama-lab diff`: what it makes of the words after it, and what it prints."""

import argparse
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.lab.compare.diff import CODE, CONFIG, DATA, ENVIRONMENT, FED, Difference, code_changes, differences
from llama_lab.lab.compare.records import load_record
from llama_lab.lab.table import print_table
from llama_lab.training.run_folder import find_run

TITLES = {CONFIG: "Config", CODE: "Code", DATA: "Data", FED: "What they were fed", ENVIRONMENT: "Environment"}


def run_diff_command(words: list[str]) -> int:
    """Print what differs between two runs.

    Args:
        words: what follows `diff` on the command line.

    Returns:
        The exit code: 0 whatever differs, 2 not understood.

    Raises:
        ConfigError: one of them is no run.
    """
    try:
        asked = _parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    a, b = (load_record(find_run(path).path) for path in (asked.a, asked.b))
    if a.folder is not None and b.folder is not None and a.folder.resolve() == b.folder.resolve():
        raise ConfigError([(str(asked.b), "is the same folder; name two runs")], scope="this request")
    found = differences(a, b)
    shown = [one for one in found if one.matters or asked.all]
    print(f"A: {a.name}\nB: {b.name}\n")
    for part, title in TITLES.items():
        if rows := [(one.what, one.a, one.b) for one in shown if one.part == part]:
            print_table(title, ("", "A", "B"), rows)
            print()
    if any(one.part == CODE for one in shown):
        print("\n".join(code_changes(a, b)) + "\n")
    print(_said(found, shown))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab diff",
        description="What differs between two runs: config, code, data, environment, and the windows they were fed. Only what can "
        "move the loss curve is shown.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="a run's folder, outputs/<name>/<run id>")
    parser.add_argument("b", type=Path, metavar="B", help="another's")
    parser.add_argument("--all", action="store_true", help="show also what cannot: names, logging, hosts")
    return parser


def _said(found: list[Difference], shown: list[Difference]) -> str:
    hidden = [one for one in found if one not in shown]
    more = f" {len(hidden)} more cannot move it: {_names(hidden)}; --all shows them" if hidden else ""
    moving = sum(one.matters for one in found)
    if not moving:
        return f"Nothing that differs can move the loss curve.{more}"
    return f"{moving} difference{'s' if moving > 1 else ''} can move the loss curve.{more}"


def _names(hidden: list[Difference]) -> str:
    names = [one.what for one in hidden]
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
