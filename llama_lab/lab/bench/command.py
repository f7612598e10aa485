"""`llama-lab bench`: configs measured one after another, as a table, as lines of JSON and as a picture."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.identity import outputs_folder
from llama_lab.config.resolve import resolve
from llama_lab.lab.bench.measure import EVERY, PARTS, WARM, Bench, forced_words, measure, said_of, told_apart
from llama_lab.lab.sweep import expand
from llama_lab.lab.table import print_table
from llama_lab.training.run_folder import relative


def run_bench_command(words: list[str]) -> int:
    """`llama-lab bench`; returns the exit code."""
    try:
        arguments, overrides = _parser().parse_known_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    if arguments.updates < (least := WARM + 2 * EVERY):
        rule = f"is too few to say anything: the first {WARM} are not counted, so {least} is the least; try {WARM + 6 * EVERY}"
        raise ConfigError([(f"--updates {arguments.updates}", rule)])
    if unknown := [word for word in overrides if word.startswith("-")]:
        raise ConfigError([(unknown[0], "is no flag of bench; llama-lab bench --help has them")])
    objective = ["sweep.objective=train/loss"] if arguments.multirun else []  # `eval=null` may be among the words
    own = None if arguments.config_dir is None else arguments.config_dir.expanduser().absolute()
    if own is not None and not own.is_dir():
        raise ConfigError([(f"--config-dir {arguments.config_dir}", "is no folder; name one with groups of options in it")])
    sweep = expand([*overrides, *objective], multirun=arguments.multirun, config_dir=own)
    configs = [overrides] if sweep is None else [[*_fixed(overrides, job.values), *_typed(job.values)] for job in sweep.jobs]
    for words_of_one in configs:  # every mistake before the first minute is spent
        resolve(compose([*words_of_one, *forced_words(words_of_one)], config_dir=own))
    shared, names = told_apart([said_of(words_of_one) for words_of_one in configs])
    if shared:
        print(f"Measuring {shared}" if len(configs) == 1 else f"In common: {shared}", flush=True)
    found = []
    for words_of_one, name in zip(configs, names, strict=True):
        found.append(measure(words_of_one, arguments.updates, config_dir=own))
        said = found[-1].error or f"{found[-1].tokens_per_second:,.0f} tokens a second, loss {found[-1].loss:.3f}"
        print(f"{name}: {said}" if name else said, flush=True)
    show(found, names)
    _write(arguments.out, found)
    return 1 if any(bench.error for bench in found) else 0


def show(found: list[Bench], names: Sequence[str]) -> None:
    """A table of what was measured.

    Args:
        names: what tells each config from the others; all empty: there is no such column.
    """
    parts = [part for part in ("data", *PARTS) if any(bench.parts.get(part) for bench in found)]
    headings = ["config", "tok/s", "±", "MFU", "peak GiB", *parts, "first update", "loss"]
    lines = []
    for bench, name in zip(found, names, strict=True):
        if bench.error:
            lines.append([name, "failed", *[""] * (len(headings) - 2)])
            continue
        shares = [f"{100 * bench.parts.get(part, 0):.1f} %" for part in parts]
        mfu = "" if bench.mfu is None else f"{100 * bench.mfu:.1f} %"
        seconds, loss = f"{bench.first_update_seconds:.1f} s", "" if bench.loss is None else f"{bench.loss:.3f}"
        speed = [f"{bench.tokens_per_second:,.0f}", f"{100 * bench.spread:.1f} %", mfu, f"{bench.peak_gib:.2f}"]
        lines.append([name, *speed, *shares, seconds, loss])
    whole = next((bench for bench in found if not bench.error), None)
    where = f" on {whole.processes} x {whole.device}, torch {whole.torch}" if whole else ""
    first = 0 if any(names) else 1
    print_table(f"Training speed{where}", headings[first:], [line[first:] for line in lines])


def _write(folder: Path, found: list[Bench]) -> None:
    """Append to bench.jsonl, and draw what was measured now."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    with (folder / "bench.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps({"time": stamp, **asdict(bench)}) + "\n" for bench in found))
    print(f"Written to {folder / 'bench.jsonl'}", end="")
    if whole := [bench for bench in found if not bench.error]:
        from llama_lab.lab.bench.picture import draw

        draw(whole, folder / "bench.png")
        print(f" and {folder / 'bench.png'}", end="")
    print()


def _typed(values: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _fixed(overrides: list[str], values: dict[str, str]) -> list[str]:
    return [word for word in overrides if word.partition("=")[0] not in values]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab bench",
        usage="llama-lab bench [--updates N] [--out DIR] [-m] [--config-dir DIR] [group=option …] [key=value …]",
        description="Measure how fast a config trains here, or with -m several: tokens a second, MFU, memory, time by part.",
        allow_abbrev=False,
    )
    parser.add_argument("--updates", type=int, default=WARM + 6 * EVERY, help="updates that are trained (default: %(default)s)")
    outputs = Path(relative(outputs_folder())) / "bench"
    parser.add_argument("--out", type=Path, default=outputs, help="folder of bench.jsonl and bench.png (default: %(default)s)")
    parser.add_argument("-m", "--multirun", action="store_true", help="values with commas are several configs")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="further options and presets")
    return parser
