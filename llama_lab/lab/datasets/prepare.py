"""`llama-lab prepare`: what it makes of the words after it, and what it prints. Torch-free."""

import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.grammar import quoted
from llama_lab.config.schema import MixtureConfig, Problem, RunConfig, ShardsConfig, TextConfig
from llama_lab.data.foreign import is_bare
from llama_lab.data.place import Stopped
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.data.shards import MANIFEST, TOKENIZER, read_manifest
from llama_lab.lab.table import print_table

NODES = ("data", "tokenizer")

Rows = list[tuple[str, str]]


def prepare_and_show(overrides: list[str], *, out: Path | None = None, config_dir: Path | None = None) -> bool:
    """Prepare what overrides ask for, and print what came of it.

    Args:
        out: the folder to make; null: a cache entry.

    Returns:
        Whether it is complete; False if it was interrupted and can be gone on with.

    Raises:
        ConfigError: the words, the text, the tokenizer or the disk do not allow it.
    """
    run = _compose(overrides, config_dir)
    _refuse_prepared(run, out)
    _refuse_inside(run, out)
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        print(sentence, flush=True)

    start = time.perf_counter()
    try:
        with _interrupted_by_sigterm():
            data = prepare(run.data, run.tokenizer, say, out=out)
    except Stopped:
        return False
    seconds = time.perf_counter() - start
    print_table("Prepared" if said else "Prepared before", ("", ""), rows(data, seconds if said else None))
    print("Train on it:")
    # The same words find a cache entry again, but not what came from standard input.
    named = out is not None or (isinstance(run.data, TextConfig) and run.data.path == "-")
    print(f"  {train_command(data.folder) if named else shlex.join(['llama-lab', 'train', *overrides])}")
    return True


def rows(data: PreparedData, seconds: float | None) -> Rows:
    """(what, how much) of a prepared folder.

    Args:
        seconds: that it took; null if it was there.
    """
    manifest = read_manifest(data.folder, str(data.folder))
    splits, vocabulary = manifest["splits"], manifest["tokenizer"]["vocab_size"]
    text_bytes = sum(split["text_bytes"] for split in splits.values())
    size = sum(file.stat().st_size for file in data.folder.iterdir())
    shards = ", ".join(f"{len(split['shards']):,} {_SIDES[name]}" for name, split in splits.items())
    return [
        *_counts(manifest["source"].get("counts", {})),
        *[
            (f"{_SIDES[name]} tokens", f"{split['tokens']:,} in {_number(split['documents'], 'document')}")
            for name, split in splits.items()
        ],
        ("text", f"{text_bytes / 1e6:,.2f} MB, {text_bytes / sum(split['tokens'] for split in splits.values()):.2f} bytes a token"),
        ("vocabulary", f"{vocabulary:,} entries, ids of {manifest['token_dtype']}"),
        ("shards", shards),
        ("on disk", f"{size / 1e6:,.2f} MB"),
        *([("took", f"{seconds:,.1f} s")] if seconds is not None else []),
        ("folder", str(data.folder)),
    ]


_SIDES = {"train": "training", "val": "validation"}


def train_command(folder: Path) -> str:
    """What to type to train on a folder, for a shell."""
    words = ["data=shards", _word("data.path", folder), "tokenizer=file", _word("tokenizer.path", folder / TOKENIZER)]
    return shlex.join(["llama-lab", "train", *words])


def _compose(overrides: list[str], config_dir: Path | None) -> RunConfig:
    """The config, with mistakes said as this command's."""
    try:
        return compose(overrides, config_dir=config_dir, nodes=NODES)
    except ConfigError as error:
        raise ConfigError([_in_our_words(problem) for problem in error.problems], scope="this request") from None


def _in_our_words(problem: Problem) -> Problem:
    subject, rule = problem
    key, equals, value = subject.partition("=")
    if not equals and Path(subject).exists():
        return subject, f"is a path; type data=text {_word('data.path', Path(subject))}"
    if key in ("out", "output", "--out"):
        return subject, f"is no field; the folder to make is named by --out {value}"
    if key == "path":
        return subject, f"is no field; type data=text {_word('data.path', Path(value))}"
    if "stands for several runs" in rule:
        return subject, "stands for several sets; prepare them one after another, each with one value"
    return subject, rule


def _refuse_prepared(run: RunConfig, out: Path | None) -> None:
    """There is nothing to do for what is tokens already, unless others wrote them and they are to be copied."""
    problem: Problem | None = None
    if isinstance(run.data, MixtureConfig):
        rule = "is made of folders that are prepared already; prepare each by itself, then llama-lab train data=mixture takes them"
        problem = ("data=mixture", rule)
    elif isinstance(run.data, ShardsConfig):
        folder = Path(run.data.path).expanduser().absolute()
        if (folder / MANIFEST).exists():
            problem = (f"data.path={run.data.path}", f"is prepared already; type {train_command(folder)}")
        elif out is None and is_bare(folder):
            rule = "holds tokens already, and train reads them where they lie; --out FOLDER makes a prepared folder of them"
            problem = (f"data.path={run.data.path}", rule)
    if problem is not None:
        raise ConfigError([problem], scope="this request")


def _refuse_inside(run: RunConfig, out: Path | None) -> None:
    """What is made must not be read as text by the same command next time."""
    if out is not None and isinstance(run.data, TextConfig):
        root = Path(run.data.path).expanduser().absolute()
        if root.is_dir() and out.is_relative_to(root):
            rule = f"lies inside data.path={run.data.path}, where it would be taken for text; name a folder elsewhere"
            raise ConfigError([(f"--out {out}", rule)], scope="this request")


def _counts(counts: dict[str, int]) -> Rows:
    """What became of everything that was read."""
    kept, read = counts.get("kept"), counts.get("read")
    found = []
    if kept is not None:
        found.append(("documents", f"{kept:,} kept" + (f" of {read:,} read" if read is not None else "")))
    reasons = {name: count for name, count in counts.items() if name not in ("kept", "read") and count}
    return found + [(f"left out: {name.replace('_', ' ')}", f"{count:,}") for name, count in reasons.items()]


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _word(key: str, path: Path) -> str:
    """An override that Hydra's grammar reads as this path."""
    text = str(path)
    if re.fullmatch(r"[\w./~+-]+", text):
        return f"{key}={text}"
    return f"{key}={quoted(text)}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
