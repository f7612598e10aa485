"""`llama-lab data inspect`: what a folder of tokens holds, in tables, decoded samples and a picture. Torch-free."""

import argparse
import difflib
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.identity import load_config
from llama_lab.config.schema import FileTokenizerConfig
from llama_lab.data import cache, foreign
from llama_lab.data.entries import Entries, entries
from llama_lab.data.id_check import check_ids
from llama_lab.data.prepare import open_prepared
from llama_lab.data.shards import MANIFEST, TOKENIZER, Split, read_manifest, verify_shards
from llama_lab.data.survey import Survey, excerpts, length_bins, survey
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.lab.table import print_table
from llama_lab.training.plots import PICTURES
from llama_lab.training.run_data import open_data, trained_on
from llama_lab.training.run_folder import RunFolder, named_run

SCOPE = "this request"
SAMPLES = 3
TOP_TOKENS = 16
SAMPLE_LINES = 8
PROGRESS_SECONDS = 5.0
TITLES = {"train": "training", "val": "validation"}


@dataclass(frozen=True, slots=True)
class Inspected:
    """Tokens that lie in one folder.

    Attributes:
        splits: `train` and `val`, as far as they are there.
        manifest: what was written when it was prepared; None for files of others.
        remarks: sentences that stand above the tables.
    """

    folder: Path
    tokenizer: Tokenizer
    splits: dict[str, Split]
    manifest: dict[str, Any] | None
    remarks: list[str] = field(default_factory=list)


def run_inspect_command(words: list[str]) -> int:
    """Answer `llama-lab data inspect`.

    Args:
        words: what follows `inspect` on the command line.

    Returns:
        The exit code: 0 done, 1 `--verify` found something, 2 not understood.

    Raises:
        ConfigError: there is nothing at the path that could be inspected.
    """
    try:
        chosen = _parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    picture = None if chosen.plot is None else _picture_file(chosen.plot)
    if chosen.verify and not _verify(chosen.path, chosen.tokenizer):
        return 1
    places = _find(chosen.path, chosen.tokenizer)
    for place in places:
        surveys = _show(place, chosen.samples)
        if picture is not None:
            from llama_lab.lab.datasets.inspect_picture import draw_surveys

            # A mixture has a picture for each of its folders.
            file = picture if len(places) == 1 else picture.with_stem(f"{picture.stem}-{place.folder.name}")
            draw_surveys(file, str(place.folder.name), surveys)
            print(f"\nThe picture is {file}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab data inspect",
        description="What tokens are like: counts, lengths of documents, frequent tokens, decoded samples.",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a prepared folder, an entry of `llama-lab cache`, a run, or a bare folder of .npy or .bin",
    )
    parser.add_argument("--verify", action="store_true", help="first read everything and compare it with its checksums")
    parser.add_argument("--samples", type=_count, default=SAMPLES, metavar="N", help=f"documents to decode (default: {SAMPLES})")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the lengths and the frequencies into a .png, .pdf or .svg")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help=f"the {TOKENIZER} of a bare folder that has none in it")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of documents; try 5")
    return int(text)


def _picture_file(path: Path) -> Path:
    path = path.expanduser().absolute()
    if path.suffix.lower() not in PICTURES:
        raise ConfigError([(f"--plot {path.name}", f"has no ending of a picture; try {path.stem or 'tokens'}.png")], scope=SCOPE)
    if not path.parent.is_dir():
        raise ConfigError([(f"--plot {path}", f"lies in {path.parent}, which is no folder")], scope=SCOPE)
    return path


def _locate(typed: str) -> Path:
    """The folder that is meant: a path, or an entry of the cache."""
    path = Path(typed).expanduser()
    if path.is_file():
        rule = f"is a file; name a folder of tokens, or make one: llama-lab prepare data=text data.path={typed}"
        raise ConfigError([(typed, rule)], scope=SCOPE)
    if path.is_dir():
        return path.absolute()
    entry = cache.prepared_root() / typed
    if Path(typed).name == typed and entry.is_dir():
        return entry
    if (run := named_run(path)).is_dir():
        return run
    close = difflib.get_close_matches(typed, [found.name for found in cache.entries()], n=1)
    hint = f"did you mean {close[0]}?" if close else "llama-lab cache lists what is prepared"
    raise ConfigError([(typed, f"is no folder, and no entry of the cache; {hint}")], scope=SCOPE)


def _find(typed: str, tokenizer: Path | None) -> list[Inspected]:
    """The folders of tokens that are meant, opened."""
    folder = _locate(typed)
    if foreign.is_bare(folder):
        return [_bare(folder, typed, tokenizer)]
    if tokenizer is not None:
        rule = f"is for bare folders of .npy or .bin files; {typed} has a tokenizer of its own"
        raise ConfigError([(f"--tokenizer {tokenizer}", rule)], scope=SCOPE)
    if (folder / "config.yaml").is_file():
        return _of_run(folder)
    if not (folder / MANIFEST).exists() and (runs := [path.parent.name for path in sorted(folder.glob("*/config.yaml"))]):
        raise ConfigError([(typed, f"holds runs; name one of them, such as {Path(typed) / runs[0]}")], scope=SCOPE)
    prepared = open_prepared(folder, typed)
    return [_own(folder, typed, prepared.tokenizer, {"train": prepared.train, "val": prepared.val})]


def _bare(folder: Path, typed: str, file: Path | None) -> Inspected:
    if file is None and not (folder / TOKENIZER).is_file():
        raise ConfigError([(typed, f"brings no {TOKENIZER}; name the one its ids were made with: --tokenizer FILE")], scope=SCOPE)
    tokens = foreign.find_tokens(folder, typed)
    tokenizer = foreign.open_tokenizer(folder, FileTokenizerConfig(path=str(file or folder / TOKENIZER)), typed)
    splits = {name: split for name in TITLES if (split := tokens.split(name)) is not None}
    return Inspected(
        folder, tokenizer, splits, None, [f"Files of others, {tokens.kind.value}; where documents begin is told by their ids"]
    )


def _own(folder: Path, subject: str, tokenizer: Tokenizer, splits: dict[str, Split | None]) -> Inspected:
    manifest = read_manifest(folder, subject)
    there = {name: split for name, split in splits.items() if split is not None}
    return Inspected(folder, tokenizer, there, manifest, [_origin(manifest)])


def _of_run(folder: Path) -> list[Inspected]:
    """The data that a run's config names; text is prepared again if the cache was cleaned."""
    run = load_config(folder / "config.yaml")
    data = open_data(run, RunFolder(folder), print)
    remarks = [f"Data of the run {folder}"]
    if trained_on(RunFolder(folder)) not in (None, data.fingerprint):
        remarks.append("It is not what the run was trained on: its tokens or its tokenizer have changed since")
    found = []
    for source in data.sources:
        splits = {"train": source.train, "val": source.val}
        if (source.folder / MANIFEST).exists():
            place = _own(source.folder, str(source.folder), data.tokenizer, splits)
        else:
            there = {name: split for name, split in splits.items() if split is not None}
            place = Inspected(source.folder, data.tokenizer, there, None)
        found.append(Inspected(place.folder, place.tokenizer, place.splits, place.manifest, [*remarks, *place.remarks]))
    return found


def _origin(manifest: dict[str, Any]) -> str:
    source = manifest["source"]
    return f"Prepared from data={source['data']} with the tokenizer asked for as {source['tokenizer']!r}"


def _verify(typed: str, tokenizer: Path | None) -> bool:
    """Read everything; say what differs from its checksums. Whether nothing does."""
    folder = _locate(typed)
    if foreign.is_bare(folder):
        place = _bare(folder, typed, tokenizer)
        check_ids(foreign.find_tokens(folder, typed), place.tokenizer.vocab_size, typed, print)
        print("Sizes are those of the headers and every id is one of the tokenizer; files of others bring no checksums to compare")
        return True
    folders = [folder] if not (folder / "config.yaml").is_file() else [place.folder for place in _of_run(folder) if place.manifest]
    problems = 0
    for one in folders:
        progress = _Progress(one)
        for subject, rule in verify_shards(one, str(one), progress.show):
            print(f"{subject} {rule}", file=sys.stderr)
            problems += 1
        if not problems:
            print(f"All files of {one} are as they were written ({progress.words()})")
    return problems == 0


class _Progress:
    """Says how far the reading of a folder is."""

    def __init__(self, folder: Path):
        self._folder, self._start, self._said, self._done = folder, time.perf_counter(), time.perf_counter(), 0

    def show(self, done: int, total: int) -> None:
        self._done, now = done, time.perf_counter()
        if now - self._said > PROGRESS_SECONDS:
            self._said = now
            left = (now - self._start) * (total - done) / max(1, done)
            print(f"Checked {done / 1e9:.1f} of {total / 1e9:.1f} GB of {self._folder}, {left:,.0f} s to go", flush=True)

    def words(self) -> str:
        return f"{self._done / 1e9:.3f} GB in {time.perf_counter() - self._start:.1f} s"


def _show(place: Inspected, samples: int) -> dict[str, Survey]:
    """Print everything about a folder; returns what was seen."""
    known = entries(place.tokenizer)
    surveys = {name: survey(split, place.tokenizer, known) for name, split in place.splits.items()}
    print(place.folder)
    for remark in place.remarks:
        print(remark)
    print()
    names = ("documents", "tokens", "bytes of text", "bytes a token", "entries used", "dtype of ids", "files")
    columns = [_figures(split, surveys[name]) for name, split in place.splits.items()]
    print_table("Splits", ("", *(TITLES[name] for name in place.splits)), list(zip(names, *columns, strict=True)))
    _show_beyond(place, surveys)
    if place.manifest is not None and (counts := place.manifest["source"].get("counts")):
        print()
        print_table(
            "Documents that were read", ("", ""), [(name.replace("_", " "), f"{count:,}") for name, count in counts.items()]
        )
    name, split = next(iter(place.splits.items()))
    seen = surveys[name]
    print()
    _show_lengths(TITLES[name], seen)
    print()
    _show_frequent(TITLES[name], seen, known)
    _show_samples(TITLES[name], split, place.tokenizer, known, samples)
    return surveys


def _figures(split: Split, seen: Survey) -> list[str]:
    used, size = int(np.count_nonzero(seen.counts)), len(seen.counts)
    is_known = split.starts_file is not None
    return [
        f"{split.documents:,}" if is_known else "unknown",
        f"{split.tokens:,}",
        f"{split.text_bytes:,}" if is_known else "unknown",
        f"{split.text_bytes / split.tokens:.3f}" if is_known else "unknown",
        f"{used:,} of {size:,} ({100 * used / size:.1f} %)" + (f" in {seen.tokens:,} tokens" if seen.is_sample else ""),
        split.dtype.name,
        f"{len(split.files):,}",
    ]


def _show_beyond(place: Inspected, surveys: dict[str, Survey]) -> None:
    beyond = sum(seen.beyond for seen in surveys.values())
    if beyond:
        size = place.tokenizer.vocab_size
        print(f"{beyond:,} ids are beyond the tokenizer's {size:,} entries: it is not the one they were made with")


def _show_lengths(title: str, seen: Survey) -> None:
    """A histogram that fits the terminal, and the figures that it does not show."""
    bins = length_bins(seen.lengths)
    if not bins:
        print(f"No whole document of the {title} split was found in {seen.tokens:,} tokens")
        return
    block = "█" if _can_show("█") else "#"
    labels = [f"{low:,} to {high:,}" if high > low else f"{low:,}" for low, high, _ in bins]
    counts = [f"{count:,}" for *_, count in bins]
    room = shutil.get_terminal_size().columns - max(map(len, labels)) - max(map(len, counts)) - 28
    scale = min(60, max(10, room)) / max(count for *_, count in bins)
    rows = [
        (label.rjust(max(map(len, labels))), shown.rjust(max(map(len, counts))), f"{100 * count / len(seen.lengths):5.1f} %", bar)
        for label, shown, (*_, count) in zip(labels, counts, bins, strict=True)
        for bar in [block * max(round(count * scale), int(count > 0))]
    ]
    print_table(f"Tokens of a {title} document", ("tokens", "documents", "share", ""), rows)
    half, ninety = np.quantile(seen.lengths, [0.5, 0.9])
    longest = f"the longest has {seen.lengths[-1]:,}"
    print(f"Mean {seen.lengths.mean():,.0f}; half have up to {half:,.0f}, nine tenths up to {ninety:,.0f}, {longest}")
    if seen.is_sample_of_documents:
        print(f"From a sample of {len(seen.lengths):,} documents")


def _show_frequent(title: str, seen: Survey, known: Entries) -> None:
    order = np.argsort(-seen.counts, kind="stable")[:TOP_TOKENS].tolist()
    rows = [
        (str(rank), str(id), _printable(known.shown(id)), f"{100 * seen.counts[id] / seen.tokens:.2f} %")
        for rank, id in enumerate(order, 1)
        if seen.counts[id]
    ]
    sample = f", from a sample of {seen.tokens:,} tokens" if seen.is_sample else ""
    print_table(f"Most frequent {title} tokens{sample}", ("rank", "id", "token", "share"), rows)


def _show_samples(title: str, split: Split, tokenizer: Tokenizer, known: Entries, number: int) -> None:
    width = max(40, min(120, shutil.get_terminal_size().columns) - 4)
    for excerpt in excerpts(split, tokenizer, known, number):
        length = "" if excerpt.tokens is None else f" ({excerpt.tokens:,} tokens)"
        print(f"\nA {title} document: {_printable(excerpt.name)}{length}")
        lines = [part for line in _printable(excerpt.text).splitlines() for part in textwrap.wrap(line.strip(), width)]
        for line in [*lines[:SAMPLE_LINES], *(["…"] if len(lines) > SAMPLE_LINES else [])]:
            print(f"    {line}")


def _printable(text: str) -> str:
    """Text that cannot give orders to a terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def _can_show(character: str) -> bool:
    try:
        character.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
