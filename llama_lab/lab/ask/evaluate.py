"""`llama-lab evaluate`: how well a trained run predicts texts and answers tasks, with how sure that is."""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.schema import CorpusConfig, DataConfig, TextConfig
from llama_lab.inference.sources import Reading
from llama_lab.inference.tasks import Task, load_tasks
from llama_lab.lab.ask.calibration_picture import draw_calibration
from llama_lab.lab.ask.generate import add_checkpoint_arguments, open_checkpoint
from llama_lab.lab.table import print_table
from llama_lab.training.plots import PICTURES
from llama_lab.training.run_folder import find_run, named_run, relative

if TYPE_CHECKING:
    from llama_lab.inference.documents import Calibration, Interval, Measured
    from llama_lab.inference.load import LoadedRun
    from llama_lab.inference.score import Score
    from llama_lab.inference.sources import Source

SCOPE = "this request"
TOTAL = "together"


def run_evaluate_command(words: list[str]) -> int:
    """Measure a run.

    Args:
        words: what follows `evaluate` on the command line.

    Returns:
        The exit code: 0 done, 2 not understood.

    Raises:
        ConfigError: there is no such run, text or task, or one of them is not as it must be.
    """
    try:
        asked = _parser().parse_intermixed_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    if asked.max_tokens is not None and asked.max_tokens < 1:
        raise ConfigError([(f"--max-tokens {asked.max_tokens}", "is below 1; leave it out to predict all of them")], scope=SCOPE)
    for name, path in (("--out", asked.out), ("--plot", asked.plot)):
        if path is not None and not path.expanduser().absolute().parent.is_dir():
            raise ConfigError([(f"{name} {path}", "lies in no folder that exists")], scope=SCOPE)
    if asked.plot is not None and asked.plot.suffix.lower() not in PICTURES:
        raise ConfigError([(f"--plot {asked.plot}", f"has no ending of a picture; try {asked.plot.stem}.png")], scope=SCOPE)
    tasks = load_tasks(asked.task)
    asked.run = named_run(asked.run)
    run = open_checkpoint(asked.run, asked.update, device=asked.device, precision=asked.precision)
    where = f"{relative(asked.run.absolute())} after {run.update} updates, {asked.precision}"
    measured = _measure_all(run, asked) if asked.paths or not tasks else {}
    if measured:
        _show_measured(f"Texts under {where}", measured, bins=asked.calibration)
    scores = _score_all(run, tasks)
    if scores:
        _show_scores(f"Tasks under {where}", scores)
    if asked.plot is not None and measured:
        draw_calibration(asked.plot.expanduser(), {name: found.calibration for name, found in measured.items()})
        print(f"The picture is {asked.plot}")
    if asked.out is not None:
        asked.out.expanduser().write_text(json.dumps(_as_json(asked, run, measured, scores), indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab evaluate",
        description="Loss, perplexity, bits per byte and calibration on texts, with intervals over documents; accuracy on tasks.",
    )
    add_checkpoint_arguments(parser)
    what = "text (file, folder or pattern), a prepared folder, or a run for what it validates on; none: RUN's own"
    parser.add_argument("paths", nargs="*", metavar="PATH", help=what)
    shapes = "questions in the shape of HellaSwag, PIQA, ARC or LAMBADA, a .jsonl file; may be given several times"
    parser.add_argument("--task", action="append", default=[], metavar="FILE", help=shapes)
    parser.add_argument("--split", choices=("val", "train"), default="val", help="of a run or a prepared folder (default: val)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="predict so many tokens of each text at most")
    parser.add_argument("--text-field", metavar="NAME", help="key or column with the text (default: that of RUN's data, or text)")
    line = "line between two documents of .txt and .md files (default: that of RUN's data); --separator=--- for dashes"
    parser.add_argument("--separator", metavar="LINE", help=line)
    parser.add_argument("--calibration", action="store_true", help="show how often the model is right at each confidence")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw that into a .png, .pdf or .svg")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    return parser


def _measure_all(run: "LoadedRun", asked: argparse.Namespace) -> dict[str, "Measured"]:
    """Every source that was typed, and all of them together where they are several."""
    from llama_lab.inference.documents import measure, together
    from llama_lab.inference.sources import find_sources, holds_own_text

    folder = find_run(asked.run)
    for typed in asked.paths:
        if holds_own_text(run.run, folder, typed):
            held_out = f"llama-lab evaluate {shlex.quote(relative(folder.path))} measures what it held out"
            _say(f"{typed} holds text that this run was trained on; {held_out}")
    sources = [
        (typed, source)
        for typed in dict.fromkeys(asked.paths or [str(asked.run)])
        for source in find_sources(typed, run.tokenizer, _say, split=asked.split, reading=_reading(run.run.data, asked))
    ]
    found: dict[str, Measured] = {}
    for name, source in _named(sources).items():
        documents = source.documents()
        found[name] = measure(run.model, documents, eos_id=run.tokenizer.eos_id, max_tokens=asked.max_tokens)
    return found | ({TOTAL: together(found.values())} if len(found) > 1 else {})


def _reading(data: DataConfig, asked: argparse.Namespace) -> Reading:
    """How text is read: as the run's was, but for what was typed."""
    field = data.text_field if isinstance(data, CorpusConfig) else "text"
    separator, unix = (data.separator, data.unix_line_ends) if isinstance(data, TextConfig) else (None, False)
    return Reading(asked.text_field or field, separator if asked.separator is None else asked.separator, unix)


def _named(sources: list[tuple[str, "Source"]]) -> dict[str, "Source"]:
    """Each source, with the path that was typed for it, under a name that no other has and that is not the total's."""
    several = len({typed for typed, _ in sources}) > 1
    named: dict[str, Source] = {}
    for typed, source in sources:
        # Of one run `its held-out text` says all; of two it would be the name of both.
        is_told = source.name == TOTAL or (several and source.name != typed)
        base = f"{typed}: {source.name}" if is_told else source.name
        name, number = base, 1
        while name in named:
            name, number = f"{base} ({number + 1})", number + 1
        named[name] = source
    return named


def _score_all(run: "LoadedRun", tasks: list[Task]) -> list["Score"]:
    from llama_lab.inference.score import score_task

    return [score_task(run.model, run.tokenizer, task) for task in tasks]


def _show_measured(title: str, measured: dict[str, "Measured"], *, bins: bool) -> None:
    from llama_lab.inference.documents import MIN_DOCUMENTS

    headings = ("text", "documents", "tokens", "loss", "95 %", "perplexity", "95 %", "bits per byte", "95 %")
    rows = []
    for name, found in measured.items():
        loss, bits = found.loss_interval(), found.bits_interval()
        shown = [name, f"{len(found.nats):,}", f"{found.tokens.sum():,.0f}", f"{found.loss:.4f}", _range(loss)]
        shown += [f"{_exp(found.loss):.2f}", _range(loss, _exp, digits=2)]
        shown += [f"{found.bits_per_byte:.4f}" if math.isfinite(found.bits_per_byte) else "-", _range(bits)]
        rows.append(shown)
    print_table(title, headings, rows)
    few = [f"{name} has {_documents(found)}" for name, found in measured.items() if found.worth < MIN_DOCUMENTS]
    if few:
        print(f"No interval for fewer than {MIN_DOCUMENTS} documents, which say too little about others: {', '.join(few)}")
    last = list(measured.values())[-1].calibration
    print(f"The first choice is right for {100 * last.accuracy:.1f} % of the tokens; expected calibration error {last.error:.4f}")
    if bins:
        for name, found in measured.items():
            _show_bins(name, found.calibration)


def _documents(found: "Measured") -> str:
    """How many documents there are, and how many of equal length they are worth, where that is what is too few."""
    from llama_lab.inference.documents import MIN_DOCUMENTS

    count = len(found.nats)
    if count < MIN_DOCUMENTS:
        return f"{count}"
    share = 100 * found.tokens.max() / found.tokens.sum()
    return f"{count}, worth {found.worth:.1f} of equal length (the longest is {share:.0f} % of the tokens)"


def _show_bins(name: str, calibration: "Calibration") -> None:
    width = 1 / len(calibration.counts)
    rows = []
    for place, (count, confidence, hits) in enumerate(
        zip(calibration.counts, calibration.confidences, calibration.hits, strict=True)
    ):
        if count:
            gap = (confidence - hits) / count
            span = f"{place * width:.2f} to {(place + 1) * width:.2f}"
            rows.append((span, f"{count:,.0f}", f"{confidence / count:.4f}", f"{hits / count:.4f}", f"{gap:+.4f}"))
    headings = ("probability of the first choice", "tokens", "mean of it", "how often right", "over-confident by")
    print_table(f"Calibration on {name}", headings, rows)


def _show_scores(title: str, scores: list["Score"]) -> None:
    rows = []
    for score in scores:
        for name, value in score.values().items():
            share = name.startswith("accuracy")
            limits = wilson(round(value * score.questions), score.questions) if share else None
            rows.append((score.name, f"{score.questions:,}", name.replace("_", " "), f"{value:.4f}", _range(limits)))
    print_table(title, ("task", "questions", "figure", "value", "95 %"), rows)


def wilson(hits: int, count: int) -> "Interval":
    """Where a share would lie for other questions of the same kind, with a confidence of 95 %.

    Source: E. B. Wilson, Probable inference, JASA 22 (1927). Unlike a normal interval it stays within 0 and 1.
    """
    from scipy.special import ndtri

    from llama_lab.inference.documents import CONFIDENCE, Interval

    z = float(ndtri((1 + CONFIDENCE) / 2))
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(max(0.0, centre - reach), min(1.0, centre + reach))


def _as_json(asked: argparse.Namespace, run: "LoadedRun", measured: dict[str, "Measured"], scores: list["Score"]) -> dict[str, Any]:
    texts = {}
    for name, found in measured.items():
        calibration = found.calibration
        texts[name] = {
            "documents": len(found.nats),
            "tokens": int(found.tokens.sum()),
            "loss": found.loss,
            "loss_interval": found.loss_interval(),
            "perplexity": _finite(_exp(found.loss)),
            "bits_per_byte": _finite(found.bits_per_byte),
            "bits_per_byte_interval": found.bits_interval(),
            "accuracy": calibration.accuracy,
            "calibration_error": calibration.error,
            "calibration": {name: getattr(calibration, name).tolist() for name in ("counts", "confidences", "hits")},
        }
    tasks = {score.name: {"questions": score.questions} | {k: _finite(v) for k, v in score.values().items()} for score in scores}
    return {"run": str(asked.run), "update": run.update, "tokens": run.tokens, "precision": asked.precision} | {
        "texts": texts,
        "tasks": tasks,
    }


def _range(limits: "Interval | None", of: Callable[[float], float] = float, digits: int = 4) -> str:
    return "-" if limits is None else f"{of(limits.low):.{digits}f} to {of(limits.high):.{digits}f}"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
