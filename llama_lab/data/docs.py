"""The documentation inside an installed Python as a corpus: language reference topics and docstrings.

Sources are parsed, never imported. Flow: files -> entries (signature, docstring) -> units (a top-level module or package, or a
topic) -> held-out units -> training text without what stands in them.
"""

import ast
import difflib
import hashlib
import importlib.machinery
import os
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import DocsConfig
from llama_lab.data.corpus import Corpus, Document, Say, hash_order, text_digest

# Raised when the same sources give other documents or another split.
FORMAT = 1
# Tests and demos document themselves in code; encodings are generated tables whose docstrings differ in a name.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "turtledemo", "site-packages", "dist-packages", "encodings", "pydoc_data"}
# A complete Python has about 2 MB; what is below this has lost its sources.
MIN_BYTES = 200_000
# A unit above this share of the validation text would dominate it.
MAX_UNIT_SHARE = 1 / 6
SHINGLE_WORDS = 8
# A training paragraph with more of its shingles in the validation text is as good as a copy.
MAX_SHARED_SHINGLES = 0.25

Entries = list[tuple[str, str]]


@dataclass(slots=True)
class Unit:
    """Documents that are held out together, because they were written together and repeat one another."""

    name: str
    documents: list[Document]

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of its text."""
        return sum(len(document.text.encode()) for document in self.documents)


class DocsSource:
    """Source files of the running Python's library, and of the installed packages asked for.

    Raises:
        ConfigError: a package cannot be found, or this Python has no library sources.
    """

    name = "docs"

    def __init__(self, config: DocsConfig):
        self._config = config
        self._stdlib = Path(sysconfig.get_path("stdlib"))
        self._files = [(path.relative_to(self._stdlib), path) for path in _python_files(self._stdlib)]
        for root in _package_roots(config.packages).values():
            paths = _python_files(root) if root.is_dir() else [root]
            self._files += [(path.relative_to(root.parent), path) for path in paths]

    def fingerprint(self) -> str:
        """Hash of every file's content: reading 12 MB takes a tenth of a second, and no date or path has to be believed."""
        found = hashlib.sha256(f"{FORMAT} {sys.version_info[:2]} {self._config.val_bytes}".encode())
        for name, path in [*self._files, (Path("topics"), self._stdlib / "pydoc_data" / "topics.py")]:
            found.update(f"\0{name.as_posix()}\0".encode(errors="surrogatepass"))
            try:
                found.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError:
                found.update(b"unreadable")
        return found.hexdigest()

    def corpus(self, say: Say, work: Path) -> Corpus:
        """Parse, de-duplicate, hold out.

        Every docstring, and every paragraph of eight words or more, is kept once. Units are held out in the order of their names'
        hashes until `val_bytes` are reached; units above a sixth of `val_bytes` come last, since one of them would be most of the
        validation text. Then training paragraphs that share word sequences with the validation text are left out.

        Raises:
            ConfigError: too little text, or `val_bytes` is more than half of it.
        """
        start = time.perf_counter()
        units = self._docstring_units() + self._topic_units()
        total = sum(unit.bytes for unit in units)
        if total < MIN_BYTES:
            rule = (
                f"finds only {total:,} bytes of documentation in {self._stdlib}: this Python came without its library's sources; "
                "use data=text data.path=FILE_OR_FOLDER"
            )
            raise ConfigError([("data=docs", rule)], scope="the data")
        if self._config.val_bytes > total // 2:
            rule = f"is more than half of the {total:,} bytes found; use at most {total // 2}"
            raise ConfigError([(f"data.val_bytes={self._config.val_bytes}", rule)], scope="the data")
        held_out = _hold_out(units, self._config.val_bytes)
        val = [document for unit in units if unit.name in held_out for document in unit.documents]
        train = [document for unit in units if unit.name not in held_out for document in unit.documents]
        train = list(_without_copies(train, val))
        val_bytes, train_bytes = (sum(len(document.text.encode()) for document in side) for side in (val, train))
        seconds = time.perf_counter() - start
        say(f"Read {len(self._files)} Python files in {seconds:.1f} s: {_mb(train_bytes)} to train on, {_mb(val_bytes)} held out")
        return Corpus.of(train, val)

    def check_unchanged(self) -> None:
        """A library is not edited while it is read; an upgrade that happens meanwhile shows in the next fingerprint."""

    def _docstring_units(self) -> list[Unit]:
        units: dict[str, Unit] = {}
        docstrings: set[bytes] = set()
        paragraphs: set[bytes] = set()
        for relative, path in self._files:
            parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
            if not parts:
                continue
            fresh = []
            for heading, docstring in _entries(path, ".".join(parts)):
                text = _fresh_paragraphs(docstring, paragraphs) if _first_time(docstring, docstrings) else ""
                if text:
                    fresh.append(f"{heading}\n{text}")
            if fresh:
                text = "\n\n".join(fresh)
                units.setdefault(parts[0], Unit(parts[0], [])).documents.append(Document(".".join(parts), text))
        return list(units.values())

    def _topic_units(self) -> list[Unit]:
        """Topics without what they have in common: the longest keeps it, and those that are mostly a chapter of it are dropped."""
        topics = _topics(self._stdlib / "pydoc_data" / "topics.py")
        paragraphs: set[bytes] = set()
        units = []
        for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
            text = _fresh_paragraphs(topics[name], paragraphs)
            if 2 * len(text) > len(topics[name]):
                units.append(Unit(f"topic {name}", [Document(f"topic {name}", text)]))
        return sorted(units, key=lambda unit: unit.name)


def _package_roots(packages: list[str]) -> dict[str, Path]:
    """Folder or file of each package; found on the import path without importing anything."""
    roots, problems = {}, []
    for name in packages:
        spec = None if "." in name else importlib.machinery.PathFinder.find_spec(name)
        if "." in name:
            problems.append((f"data.packages={name}", f"is inside a package; name the package, {name.split('.')[0]}"))
        elif name in sys.stdlib_module_names:
            problems.append((f"data.packages={name}", "is in the standard library, which is read anyway; leave it out"))
        elif spec is None:
            installed = {path.name for folder in sys.path for path in _folders(folder)}
            close = difflib.get_close_matches(name, installed, n=1)
            hint = f"did you mean {close[0]}?" if close else "give its import name, or install it"
            problems.append((f"data.packages={name}", f"is not installed; {hint}"))
        elif spec.submodule_search_locations:
            roots[name] = Path(next(iter(spec.submodule_search_locations)))
        elif spec.origin is not None and spec.origin.endswith(".py"):
            roots[name] = Path(spec.origin)
        else:
            problems.append((f"data.packages={name}", "is compiled, so it has no docstrings to read; leave it out"))
    if problems:
        raise ConfigError(problems, scope="the data")
    return roots


def _folders(folder: str) -> Iterator[Path]:
    if folder and Path(folder).is_dir():
        yield from (path for path in Path(folder).iterdir() if path.is_dir() and path.name.isidentifier())


def _python_files(root: Path) -> list[Path]:
    """Sources below a folder, in the order of their names, without tests and generated tables."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name.isidentifier() and name not in SKIPPED_FOLDERS and name != "__pycache__")
        found += [Path(folder, file) for file in sorted(files) if file.endswith(".py")]
    return sorted(found)


def _entries(path: Path, module: str) -> Entries:
    """(heading, docstring) of the module and of what it defines, in source order; empty for a file that is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stranger's invalid escape sequence
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            return []
    own = ast.get_docstring(tree)
    found = [(module, own), *_definitions(tree, "")] if own else _definitions(tree, "")
    return [(heading, _encodable(text)) for heading, text in found]


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Entries of classes and functions, and of those inside them; also below `if` and `try`."""
    for child in _statements(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(child)
            if text:
                yield _heading(child, prefix), text
            yield from _definitions(child, f"{prefix}{child.name}.")
        else:
            yield from _definitions(child, prefix)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for field in ("body", "handlers", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list):
            yield from block


def _heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> str:
    """`class Name`, or `Name.method(its, parameters)`. Defaults and annotations are left out: they are code, not English."""
    if isinstance(node, ast.ClassDef):
        return f"class {prefix}{node.name}"
    arguments = node.args
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    if prefix and names[:1] in (["self"], ["cls"]):
        del names[0]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    names += [argument.arg for argument in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return f"{prefix}{node.name}({', '.join(names)})"


def _topics(path: Path) -> dict[str, str]:
    """The language reference that `help()` shows; none where the file is missing or of another form."""
    try:
        tree = ast.parse(path.read_bytes())
        found = next((ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)), {})
    except (OSError, SyntaxError, ValueError):
        return {}
    return {str(name): _encodable(str(text)) for name, text in found.items()} if isinstance(found, dict) else {}


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip("\n") for paragraph in re.split(r"\n[ \t]*\n", text) if paragraph.strip()]


def _fresh_paragraphs(text: str, seen: set[bytes]) -> str:
    """The text without the paragraphs that were seen before; short ones ("For example:") belong to no one and stay."""
    paragraphs = _paragraphs(text)
    kept = [paragraph for paragraph in paragraphs if len(paragraph.split()) < SHINGLE_WORDS or _first_time(paragraph, seen)]
    return text if len(kept) == len(paragraphs) else "\n\n".join(kept)


def _first_time(text: str, seen: set[bytes]) -> bool:
    key = text_digest(text)
    if key in seen:
        return False
    seen.add(key)
    return True


def _encodable(text: str) -> str:
    """A docstring may hold half a surrogate pair, which has no UTF-8."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _hold_out(units: list[Unit], val_bytes: int) -> set[str]:
    """Names of the units that make at least `val_bytes`, chosen by hash, so that what is easy to predict is not preferred."""
    held_out: set[str] = set()
    size = 0
    for unit in sorted(units, key=lambda unit: (unit.bytes > val_bytes * MAX_UNIT_SHARE, hash_order(unit.name))):
        if size >= val_bytes:
            break
        held_out.add(unit.name)
        size += unit.bytes
    return held_out


def _without_copies(train: Iterable[Document], val: Iterable[Document]) -> Iterator[Document]:
    """Training documents without the paragraphs that mostly stand in the validation text, word for word."""
    held_out = {shingle for document in val for shingle in _shingles(document.text)}
    for document in train:
        paragraphs = _paragraphs(document.text)
        kept = []
        for paragraph in paragraphs:
            shingles = _shingles(paragraph)
            if sum(shingle in held_out for shingle in shingles) <= MAX_SHARED_SHINGLES * len(shingles):
                kept.append(paragraph)
        if len(kept) == len(paragraphs):
            yield document
        elif kept:
            yield Document(document.name, "\n\n".join(kept))


def _shingles(text: str) -> list[str]:
    words = text.split()
    return [" ".join(words[start : start + SHINGLE_WORDS]) for start in range(len(words) - SHINGLE_WORDS + 1)]


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
