"""`llama-lab report`: what it makes of the words after it, and the files that it writes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.lab.compare.question import RUNS_HELP, add_question, read_loss, read_question
from llama_lab.lab.report.blocks import Prose, Section
from llama_lab.lab.report.figures import drawn_metrics, names_of
from llama_lab.lab.report.markdown import write_markdown
from llama_lab.lab.report.material import Asked, Material, gather
from llama_lab.lab.report.page import write_page
from llama_lab.lab.report.sections import all_sections
from llama_lab.training.run_folder import relative

PAGE, MARKDOWN, PICTURE = "report.html", "report.md", "curves.png"


def run_report_command(words: list[str]) -> int:
    """Write a report and print its answer.

    Args:
        words: what follows `report` on the command line.

    Returns:
        The exit code: 0 written, 2 not understood.

    Raises:
        ConfigError: the runs cannot be found, or the files cannot be written.
    """
    try:
        asked = _parser().parse_intermixed_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    question = Asked(
        question=read_question(asked),
        baseline=asked.baseline,
        ignore=asked.ignore,
        is_timed=asked.to_loss is not None,
        to_loss=None if asked.to_loss is None else read_loss(asked.to_loss),
        title=asked.title,
    )
    material = gather(asked.runs, question, ["llama-lab", "report", *words])
    folder = Path(asked.out).expanduser() if asked.out is not None else _place(material)
    sections, written = write_report(material, folder)
    for line in (line for block in sections[0].blocks if isinstance(block, Prose) for line in block.lines):
        print(line)
    print(f"\nWritten: {', '.join(relative(path.absolute()) for path in written)}")
    return 0


def report_sweep(folder: Path) -> Path:
    """Write the page of a sweep beside its summary.csv, and return its path. Markdown and picture are left to `llama-lab report`.

    Raises:
        ConfigError: there is nothing to report yet.
    """
    material = gather([str(folder)], Asked(), ["llama-lab", "report", relative(folder)])
    return write_report(material, folder, page_only=True)[1][0]


def write_report(material: Material, folder: Path, *, page_only: bool = False) -> tuple[list[Section], list[Path]]:
    """Write the files of a report.

    Args:
        folder: made if it is not there; what is in it by those names is replaced.
        page_only: leave out Markdown and picture.

    Returns:
        The sections, and the files.

    Raises:
        ConfigError: they cannot be written.
    """
    drawn = drawn_metrics(material)
    sections = all_sections(material, drawn)
    names, brief = names_of(material)
    files = {PAGE: write_page(material.title, sections, brief)}
    if not page_only:
        files[MARKDOWN] = write_markdown(material.title, sections, PICTURE if drawn else None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            draft = folder / f".{name}.draft"
            draft.write_text(text, encoding="utf-8", newline="\n")
            draft.replace(folder / name)
        written = [folder / name for name in files]
        if drawn and not page_only:
            from llama_lab.lab.report.picture import draw_curves

            draw_curves(drawn[0], names, folder / PICTURE, higher_is_better=material.higher_is_better)
            written.append(folder / PICTURE)
    except OSError as error:
        raise ConfigError([(f"--out {folder}", f"cannot be written: {error}")], scope="this report") from None
    return sections, written


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="One page that answers which config is better and shows what that rests on: verdicts, curves, samples,\n"
        f"differences, cost, environment. {PAGE} needs no network and no other file; {MARKDOWN} and {PICTURE} are for a commit.\n\n"
        "  llama-lab report outputs/study                       every run in a folder -> outputs/study/report/\n"
        "  llama-lab report outputs/study/sweeps/lr-1f2e        a sweep -> beside its summary.csv\n"
        "  llama-lab report outputs/study --out experiments/study --to-loss",
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help=RUNS_HELP)
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the report (default: report/ beside the runs; a sweep's own folder)"
    )
    parser.add_argument("--title", metavar="TEXT", help="what it is called (default: the study's name)")
    add_question(parser)
    return parser


def _place(material: Material) -> Path:
    """Where a report goes that nobody gave a place."""
    if material.sweep is not None:
        return material.sweep.folder
    parents: Sequence[Path] = list(dict.fromkeys(run.folder.parent for run in material.runs if run.folder is not None))
    return (parents[0] if len(parents) == 1 else Path.cwd()) / "report"
