"""Files of text as items: the lines of .jsonl, the rows of .parquet, the documents of .txt and .md, in bounded memory.

An item is a text or the reason why there is none. Items have the same numbers whenever a file is read, so that a second reading may
name those it wants, and the others are stepped over without being decoded. Nothing here chooses among texts; that is for `scan`.
"""

import gzip
import importlib
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Problem

COMPRESSED = (".gz", ".xz", ".zst")
READABLE = ".txt, .md, .jsonl (each also .gz, .xz or .zst) or .parquet"
# A larger text of a .txt or .md file is cut into documents of about this size.
MAX_TEXT_BYTES = 8_000_000
BLOCK_BYTES = 1 << 20
BATCH_ROWS = 512
# What tells text from other bytes: control characters that it hardly has. In random bytes they are a tenth.
LOOKED_AT_BYTES = 1 << 16
CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\f\r\x1b")) + b"\x7f"
CONTROL_SHARE = 0.02

Progress = Callable[[int], None]
"""Takes the bytes of a file that were read so far."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file that can be read.

    Attributes:
        name: what its documents are called after.
        first: added to the numbers of its items, for files that go on where another ended.
    """

    path: Path
    name: str
    first: int = 0


class Item(NamedTuple):
    """A text, or the reason why there is none.

    Attributes:
        index: its place among the items of the file, from 0.
        number: of the line, row or part, from 1; 0 where the file is one text.
        text: empty if there is a problem.
        problem: where it stands, and what is wrong with it.
        count: how many items in a row share the problem.
    """

    index: int
    number: int
    text: str
    problem: Problem | None = None
    count: int = 1


def form_of(path: Path) -> str | None:
    """How a file is read, by its name: `text`, `lines`, `table`, or None if not at all."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    if name.endswith(".parquet"):
        return "table" if path.name.lower().endswith(".parquet") else None
    return {".txt": "text", ".md": "text", ".jsonl": "lines"}.get(Path(name).suffix)


def require_packages(files: list[TextFile]) -> None:
    """Import what the files need beyond the standard library.

    Raises:
        ConfigError: a package of the `data` extra is not installed.
    """
    for file in files:
        if form_of(file.path) == "table":
            require("pyarrow.parquet", str(file.path))
        elif file.path.suffix.lower() == ".zst":
            zstd(str(file.path))


def require(module: str, subject: str) -> Any:
    """Import a module of the `data` extra for the sake of `subject`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        rule = f"needs {module.partition('.')[0]}, which is not installed; type pip install 'llama_lab[data]'"
        raise ConfigError([(subject, rule)], scope="the data") from error


def zstd(subject: str) -> Any:
    """The module that reads and writes Zstandard: the standard library's from Python 3.14 on, else its backport."""
    return require("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", subject)


def read_items(
    file: TextFile,
    field: str,
    separator: str | None,
    wanted: np.ndarray | None = None,
    progress: Progress = lambda done: None,
) -> Iterator[Item]:
    """Every item of a file, or those that are wanted, in their order.

    A .jsonl file has an item a line that is not blank, a .parquet file one a row. A .txt or .md file is one text, or as many as its
    separator lines part; a text above `MAX_TEXT_BYTES` is cut before the last line that starts within them, else before the last
    space, else between two characters. Line ends stay as they are; a byte order mark goes. Compressed files are read as a stream.

    Args:
        field: key of a JSON object or column of a table that holds the text.
        separator: the line between two texts of a .txt or .md file, white space around it aside.
        wanted: for each item, whether it is given; None gives all.
        progress: told now and then how far the reading is.
    """
    form = form_of(file.path)
    if form == "table":
        yield from _table_items(file, field, wanted, progress)
        return
    raw = _opened(file.path)
    if isinstance(raw, str):
        yield Item(0, 0, "", (str(file.path), raw))
        return
    with raw, closing(_decompressed(raw, file.path)) as stream:
        if form == "lines":
            items = _json_items(file, stream, field, wanted)
        else:
            items = _text_items(file, stream, None if separator is None else separator.strip().encode(), wanted)
        for item in items:
            progress(raw.tell())
            yield item


def with_unix_line_ends(text: str) -> str:
    """A text in which each line ends with a line feed, as Python's own text files are read."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_of(value: dict[str, Any], field: str) -> tuple[str, str | None]:
    """The text of a JSON object or of a row, and what is wrong with it, if something is."""
    if field not in value:
        keys = ", ".join(sorted(map(str, value))[:6]) or "nothing"
        longest = max((key for key in value if isinstance(value[key], str)), key=lambda key: len(value[key]), default=None)
        return "", f"has no `{field}`; it has {keys}. {_naming(longest)}"
    text = value[field]
    if not isinstance(text, str):
        return "", f"has a {_json_type(text)} as `{field}`; it must be a string"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return "", f"holds half a surrogate pair at character {error.start} of `{field}`, which has no UTF-8"
    return text, None


def _naming(key: str | None) -> str:
    """What to type where the text has another key, such as `key`."""
    if key is None or not (key.isascii() and key.isidentifier()):
        return "Name the one that holds the text with data.text_field=…"
    return f"Name the one that holds the text, for example data.text_field={key}"


def has_windows_line_ends(file: TextFile) -> bool:
    """Whether lines of a plain .txt or .md file end with a carriage return, by its beginning."""
    if form_of(file.path) != "text" or file.path.suffix.lower() in COMPRESSED:
        return False
    raw = _opened(file.path)
    if isinstance(raw, str):
        return False
    with raw:
        return b"\r\n" in raw.read(LOOKED_AT_BYTES)


def _opened(path: Path) -> BinaryIO | str:
    """The file, or why it cannot be read."""
    try:
        return path.open("rb")
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    opened: Any = raw
    match path.suffix.lower():
        case ".gz":
            opened = gzip.GzipFile(fileobj=raw)
        case ".xz":
            opened = lzma.LZMAFile(raw)  # noqa: SIM115 - closed by the caller
        case ".zst":
            opened = zstd(str(path)).ZstdFile(raw)
    return opened


def _broken_stream(path: Path) -> tuple[type[Exception], ...]:
    """What a stream raises that is cut off, damaged, or on a disk that fails."""
    more = (zstd(str(path)).ZstdError,) if path.suffix.lower() == ".zst" else ()
    return (EOFError, OSError, zlib.error, lzma.LZMAError, *more)


def _reason(path: Path, error: Exception) -> str:
    if path.suffix.lower() in COMPRESSED:
        return f"cannot be decompressed from here on: {error}; copy or download the file again"
    return f"cannot be read from here on: {getattr(error, 'strerror', None) or error}"


def _json_items(file: TextFile, stream: BinaryIO, field: str, wanted: np.ndarray | None) -> Iterator[Item]:
    """One item a line that is not blank. Where the stream breaks off, the line begun is lost with all that follow: one item."""
    index = number = 0
    broken: Exception | None = None
    lines = iter(stream)
    failures = _broken_stream(file.path)
    while broken is None and (wanted is None or index < len(wanted)):
        try:
            line = next(lines)
        except StopIteration:
            return
        except failures as error:
            broken, line = error, b"-"
        number += 1
        if line.isspace():
            continue
        if wanted is None or wanted[index]:
            text, problem = ("", _reason(file.path, broken)) if broken is not None else _json_text(line, field)
            yield Item(index, file.first + number, text, None if problem is None else (f"{file.path}:{number}", problem))
        index += 1


def _json_text(line: bytes, field: str) -> tuple[str, str | None]:
    text, problem = _decoded(line)
    if problem is not None:
        return "", problem
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return "", f"is no JSON object: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return "", f"is no JSON object: {error}"
    if not isinstance(value, dict):
        return "", f"is a JSON {_json_type(value)}, not an object with a `{field}` string"
    return text_of(value, field)


def _text_items(file: TextFile, stream: BinaryIO, separator: bytes | None, wanted: np.ndarray | None) -> Iterator[Item]:
    index = 0
    broken: Exception | None = None
    parts = _parts(stream, separator)
    failures = _broken_stream(file.path)
    offset, raw, whole = 0, b"", True
    while broken is None and (wanted is None or index < len(wanted)):
        try:
            offset, raw, whole = next(parts)
        except StopIteration:
            return
        except failures as error:
            broken, offset, whole = error, offset + len(raw), index == 0
        if wanted is None or wanted[index]:
            text, problem = ("", _reason(file.path, broken)) if broken is not None else _decoded(raw, offset)
            number = 0 if whole else file.first + index + 1
            subject = str(file.path) if whole else f"{file.path} part {index + 1}"
            yield Item(index, number, text, None if problem is None else (subject, problem))
        index += 1


def _parts(stream: Any, separator: bytes | None) -> Iterator[tuple[int, bytes, bool]]:
    """(offset in the file, bytes, whether they are all of it) of each text of a .txt or .md file."""
    held, offset, ended, parted = b"", 0, False, False
    while True:
        blocks = [held]
        size = len(held)
        while not ended and size <= MAX_TEXT_BYTES:
            block = stream.read1(BLOCK_BYTES)
            ended = not block
            size += len(block)
            blocks.append(block)
        held = b"".join(blocks)
        start = 0
        while separator is not None and (found := _separator(held, separator, start, ended)) is not None:
            yield offset + start, held[start : found[0]], False
            start, parted = found[1], True
        offset, held = offset + start, held[start:]
        if len(held) > MAX_TEXT_BYTES:
            cut = _cut(held)
            yield offset, held[:cut], False
            offset, held, parted = offset + cut, held[cut:], True
        elif ended:
            if held or not parted:
                yield offset, held, not parted
            return


def _separator(held: bytes, separator: bytes, start: int, ended: bool) -> tuple[int, int] | None:
    """Where the next separator line starts and ends; none if the text before it is too long, or if it may go on behind `held`."""
    at = held.find(separator, start)
    while at >= 0:
        begin = held.rfind(b"\n", start, at) + 1 or start
        end = held.find(b"\n", at) + 1
        if begin - start > MAX_TEXT_BYTES or (end == 0 and not ended):
            return None
        end = end or len(held)
        if held[begin:end].strip() == separator:
            return begin, end
        at = held.find(separator, end)
    return None


def _cut(held: bytes) -> int:
    """Where a text that is too long is cut, according to `read_items`."""
    cut = held.rfind(b"\n", 0, MAX_TEXT_BYTES) + 1 or held.rfind(b" ", 0, MAX_TEXT_BYTES)
    if cut > 0:
        return cut
    cut = MAX_TEXT_BYTES
    while cut > MAX_TEXT_BYTES - 4 and held[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _decoded(raw: bytes, offset: int = 0) -> tuple[str, str | None]:
    """Text of UTF-8 bytes, a byte order mark at the beginning left out; line ends stay as they are."""
    try:
        return raw.decode("utf-8" if offset else "utf-8-sig"), None
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and not raw[: error.start].isascii():
            end = f"ends in the middle of a character, at offset {offset + error.start}"
            return "", f"{end}; copy all of it, or cut it behind a line"
        form = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        if form == "LATIN1" and _is_binary(raw):
            # As LATIN1 anything at all can be converted, and be trained on as noise.
            return "", "does not look like text: it holds bytes that no text has; leave it out, or convert it with what made it"
        hint = f"convert it, for example with iconv -f {form} -t UTF-8 OLD > NEW"
        return "", f"is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}; {hint}"


def _is_binary(raw: bytes) -> bool:
    """Whether bytes are no text in any encoding of one byte a character: one is 0, or many are control characters."""
    beginning = raw[:LOOKED_AT_BYTES]
    return 0 in beginning or len(beginning) - len(beginning.translate(None, CONTROLS)) > CONTROL_SHARE * len(beginning)


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _table_items(file: TextFile, field: str, wanted: np.ndarray | None, progress: Progress) -> Iterator[Item]:
    """One item a row, read row group by row group. Where a group breaks off, the rest of its rows are lost."""
    pyarrow = require("pyarrow", str(file.path))
    parquet = require("pyarrow.parquet", str(file.path))
    table: Any = None
    reason = ""
    try:
        size = file.path.stat().st_size
        table = parquet.ParquetFile(file.path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        size, reason = 0, f"is no Parquet file that can be read: {_first_line(error)}; copy or download it again"
    if table is None:
        yield Item(0, 0, "", (str(file.path), reason))
        return
    with table:
        rows = table.metadata.num_rows
        problem = _column_problem(pyarrow, table.schema_arrow, field)
        if problem is not None:
            yield Item(0, 0, "", (str(file.path), problem), max(rows, 1))
            return
        start = 0
        for group in range(table.num_row_groups):
            end = start + table.metadata.row_group(group).num_rows
            if wanted is None or wanted[start:end].any():
                for item in _group_items(pyarrow, table, file, field, group, (start, end)):
                    if wanted is None or wanted[item.index : item.index + item.count].any():
                        progress(size * item.index // max(rows, 1))
                        yield item
            start = end


def _group_items(pyarrow: Any, table: Any, file: TextFile, field: str, group: int, rows: tuple[int, int]) -> Iterator[Item]:
    row = rows[0]
    broken: str | None = None
    try:
        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=[field], use_threads=False):
            for value in batch.column(field):
                try:
                    text, problem = text_of({field: value.as_py()}, field)
                except UnicodeDecodeError as error:
                    text, problem = "", f"is not UTF-8: {error.reason} at offset {error.start}"
                yield Item(row, file.first + row + 1, text, None if problem is None else (f"{file.path} row {row + 1}", problem))
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        broken = _first_line(error)
    if row < rows[1]:
        subject = f"{file.path} row group {group + 1}"
        rule = f"cannot be read from row {row + 1} to {rows[1]}: {broken or 'they are missing'}; copy or download the file again"
        yield Item(row, file.first + row + 1, "", (subject, rule), rows[1] - row)


def _column_problem(pyarrow: Any, schema: Any, field: str) -> str | None:
    if field not in schema.names:
        columns = ", ".join(schema.names[:6]) or "none"
        strings = [name for name in schema.names if _is_string(pyarrow, schema.field(name).type)]
        return f"has no column `{field}`; it has {columns}. {_naming(strings[0] if strings else None)}"
    kind = schema.field(field).type
    if _is_string(pyarrow, kind):
        return None
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return f"has {kind} values in the column `{field}`; they must be strings"


def _is_string(pyarrow: Any, kind: Any) -> bool:
    types = pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
