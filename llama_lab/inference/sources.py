"""Texts that a trained model is measured on: what a run held out, prepared sets, and files of text. Torch-free."""

import filecmp
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config
from llama_lab.config.schema import RunConfig, TextConfig
from llama_lab.data.prepare import open_prepared, text_key
from llama_lab.data.reading import TextFile, read_items, with_unix_line_ends
from llama_lab.data.shards import MANIFEST, Split
from llama_lab.data.text import find_files
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.training.run_data import MADE_BY, at_home, open_data, trained_on
from llama_lab.training.run_folder import RunFolder, named_run

SCOPE = "this request"
RUN_OR_SET = ("config.yaml", MANIFEST)
EDGES_AT_ONCE = 4096
"""Edges of documents that are in memory as Python numbers; all of a large set's would take gigabytes."""


class Document(NamedTuple):
    """A text as ids.

    Attributes:
        ids: without the end-of-document token.
        text_bytes: UTF-8 bytes of its text; 0 if unknown.
    """

    ids: np.ndarray
    text_bytes: int


class Reading(NamedTuple):
    """How files of text are read, where it matters as the run's own were.

    Attributes:
        field: key or column that holds the text in .jsonl and .parquet files.
        separator: line between two documents in .txt and .md files; None: a file is one.
        unix_line_ends: whether all line ends become line feeds.
    """

    field: str = "text"
    separator: str | None = None
    unix_line_ends: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """Documents under a name.

    Attributes:
        documents: gives them, anew at each call.
    """

    name: str
    documents: Callable[[], Iterator[Document]]


def find_sources(
    typed: str,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
    *,
    split: str = "val",
    reading: Reading | None = None,
) -> list[Source]:
    """What a path stands for.

    Args:
        typed: a run, for what it validates on; a folder that `llama-lab prepare` made; or text: a file, folder or pattern.
        tokenizer: of the model, which texts are encoded with, and which sets must have been prepared with.
        split: of a run or a prepared set, `val` or `train`.
        reading: how text is read.

    Raises:
        ConfigError: there is nothing, or it was made with another tokenizer.
    """
    path = named_run(Path(typed))
    if (path / "config.yaml").is_file():
        return _of_run(path, typed, tokenizer, say, split)
    if (path / MANIFEST).is_file():
        return [_of_set(path, typed, tokenizer, split)]
    try:
        files = find_files(typed)
    except ConfigError as error:
        raise ConfigError([(typed, rule) for _, rule in error.problems], scope=SCOPE) from None
    return [Source(typed, lambda: _of_files(files, typed, tokenizer, reading or Reading()))]


def holds_own_text(run: RunConfig, folder: RunFolder, typed: str) -> bool:
    """Whether a path holds text that the run was trained on: all of it, wherever it lies now, or one of its files or a copy."""
    own, path = at_home(run, folder), Path(typed).expanduser()
    data = own.data
    if not isinstance(data, TextConfig) or "-" in (typed, data.path) or any((path / name).is_file() for name in RUN_OR_SET):
        return False
    try:
        theirs = find_files(typed)
        if text_key(replace(data, path=typed), own.tokenizer) == folder.meta().get(MADE_BY):
            return True
        by_size: dict[int, list[Path]] = {}
        for file in find_files(data.path):
            by_size.setdefault(file.path.stat().st_size, []).append(file.path)
        pairs = ((file.path, other) for file in theirs if (size := file.path.stat().st_size) for other in by_size.get(size, ()))
        return any(one.samefile(other) or filecmp.cmp(one, other, shallow=False) for one, other in pairs)
    except (ConfigError, OSError):  # the run's text is no longer there
        return False


def _of_run(folder: Path, typed: str, tokenizer: Tokenizer, say: Callable[[str], None], split: str) -> list[Source]:
    known = RunFolder(folder)
    data = open_data(load_config(folder / "config.yaml"), known, say)
    _check_tokenizer(data.tokenizer, tokenizer, typed)
    if (then := trained_on(known)) not in (None, data.fingerprint):
        changed = f"was trained on other data than its config finds now ({then[:12]} then, {data.fingerprint[:12]} now)"
        rule = f"{changed}, so what it held out is not known; put that data back, or name a file of text to measure"
        raise ConfigError([(typed, rule)], scope=SCOPE)
    found = []
    for source in data.sources:
        tokens = source.val if split == "val" else source.train
        if tokens is not None:
            name = source.name if len(data.sources) > 1 else f"its {'held-out' if split == 'val' else 'training'} text"
            found.append(Source(name, lambda tokens=tokens: _of_split(tokens, typed)))
    if not found:
        raise ConfigError([(typed, "holds out no text; --split train measures what it is trained on")], scope=SCOPE)
    return found


def _of_set(folder: Path, typed: str, tokenizer: Tokenizer, split: str) -> Source:
    prepared = open_prepared(folder, typed)
    _check_tokenizer(prepared.tokenizer, tokenizer, typed)
    tokens = prepared.val if split == "val" else prepared.train
    if tokens is None:
        raise ConfigError([(typed, "has no validation tokens; --split train measures its training tokens")], scope=SCOPE)
    return Source(typed, lambda: _of_split(tokens, typed))


def _check_tokenizer(theirs: Tokenizer, ours: Tokenizer, typed: str) -> None:
    if theirs.hash != ours.hash:
        rule = "was prepared with another tokenizer than this run's, so its ids mean something else; name the text itself"
        raise ConfigError([(typed, rule)], scope=SCOPE)


def _of_split(split: Split, typed: str) -> Iterator[Document]:
    try:
        starts = split.document_starts
    except ValueError:
        rule = "does not say where documents begin; llama-lab prepare makes a set of it that does"
        raise ConfigError([(typed, rule)], scope=SCOPE) from None
    before = 0
    for first in range(0, len(starts) - 1, EDGES_AT_ONCE):
        for start, end in pairwise(starts[first : first + EDGES_AT_ONCE + 1].tolist()):
            size = split.bytes_before(end)
            yield Document(split.read(start + 1, end), size - before)
            before = size


def _with_flags(rule: str) -> str:
    """A rule that speaks of a config's fields, as this command has them."""
    return rule.replace("data.text_field=", "--text-field ")


def _of_files(files: list[TextFile], typed: str, tokenizer: Tokenizer, reading: Reading) -> Iterator[Document]:
    sizes: list[int] = []

    def texts() -> Iterator[str]:
        for file in files:
            for item in read_items(file, reading.field, reading.separator):
                if item.problem is not None:
                    subject, rule = item.problem
                    raise ConfigError([(subject, _with_flags(rule))], scope=SCOPE)
                text = with_unix_line_ends(item.text) if reading.unix_line_ends else item.text
                if text.strip():
                    sizes.append(len(text.encode()))
                    yield text

    number = 0
    for number, ids in enumerate(tokenizer.encode_stream(texts()), 1):
        yield Document(ids, sizes[number - 1])
    if number == 0:
        raise ConfigError([(typed, "holds no text")], scope=SCOPE)
