"""Files of the user's own text as a corpus: found at a path, scanned, and read again for each pass.

Flow: path -> files -> `scan` (filters) -> `selection` (duplicates, split) -> corpus. `huggingface` goes the same way with files of
its own.
"""

import atexit
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from glob import has_magic
from itertools import islice
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.paths import or_meant
from llama_lab.config.schema import CorpusConfig, OnError, Problem, TextConfig
from llama_lab.data.cache import ContentHashes, entries, in_use, mark_used, prepared_root, remove, writing_cache
from llama_lab.data.corpus import Corpus, Document, Say, Side
from llama_lab.data.near import require_signer
from llama_lab.data.reading import READABLE, TextFile, form_of, has_windows_line_ends, require_packages
from llama_lab.data.scan import MAX_PROBLEMS, Rules
from llama_lab.data.scan_pool import scan_files
from llama_lab.data.selection import MIN_DOCUMENTS, Selection, select, selected_documents

# Raised when the same files give other documents or another split.
FORMAT = 2
SAID_PROBLEMS = 3
ADDRESS = re.compile(r"[a-z][a-z0-9+]+://", re.IGNORECASE)
LOOKED_AT_FILES = 20
BLOCK_BYTES = 1 << 20
_going_on: set[Path] = set()
"""Files whose preparation has begun and not ended."""
LEFT_OUT = {
    "empty": "empty",
    "broken": "that cannot be read",
    "not_ascii": "with characters beyond ASCII",
    "other_length": "of another length",
    "duplicates": "that repeated others",
    "near_duplicates": "that nearly repeated others",
}


class TextSource:
    """The files of text at a path.

    Args:
        config: the node; its path may start with `~`.
        hashes: remembers the hashes of large files.
        processes: how many may read at once; None is one a core where there is much to read.

    Raises:
        ConfigError: nothing is there that could be read, or a package that reading needs is missing.
    """

    name = "text"

    def __init__(self, config: TextConfig, hashes: ContentHashes, processes: int | None = None):
        self._config = config
        self._hashes = hashes
        self._processes = processes
        self._files = find_files(config.path)
        require_packages(self._files)
        if Rules.of(config).near:
            require_signer()
        self._stats: dict[Path, tuple[int, int]] = {}

    def fingerprint(self) -> str:
        """Hash of the files' contents, of their names below the path, which decide on their order, and of what chooses."""
        read_as = [self._config.separator, *(["unix_line_ends"] if self._config.unix_line_ends else [])]
        found = hashlib.sha256(json.dumps([FORMAT, *chosen_by(self._config), *read_as]).encode())
        single = len(self._files) == 1 and "/" not in self._files[0].name
        for file in self._files:
            name = "".join(file.path.suffixes[-2:]).lower() if single else file.name
            try:
                self._stats[file.path] = _stat(file.path)
                content = self._hashes.of(file.path)
            except OSError as error:
                raise _unreadable(file.path, error) from error
            found.update(f"\0{name}\0{content}".encode(errors="surrogatepass"))
        return found.hexdigest()

    def corpus(self, say: Say, work: Path) -> Corpus:
        """Read everything once, report what is wrong with it, and decide for each document whether it is kept and on which side.

        A document that repeats an earlier one, white space aside, is dropped. From 20 documents on, one is held out if the hash
        of its text falls into the first `val_fraction` of all hashes; so it stays on its side when the files grow. Below 20, the
        last `val_fraction` of all text is held out, cut between two characters.

        Raises:
            ConfigError: broken lines, a wrong encoding, or no text for one of the sides.
        """
        rules = Rules.of(self._config)
        _going_on.update(self._stats)
        try:
            return read_corpus(
                lambda limit: (self._files, False),
                self._config,
                rules,
                work,
                say,
                subject=f"data.path={self._config.path}",
                check=self._check_file,
                processes=self._processes,
            )
        except ConfigError:  # other text is read next time
            _going_on.difference_update(self._stats)
            raise

    def check_unchanged(self) -> None:
        """Raise ConfigError if a file has another size or date than when its hash was taken. Nothing is read after it."""
        _going_on.difference_update(self._stats)
        for path in self._stats:
            self._check_file(path)

    def _check_file(self, path: Path) -> None:
        try:
            now = _stat(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        if now != self._stats.get(path, now):
            raise ConfigError([(str(path), "changed while it was being read; run the command again")], scope="the data")


def chosen_by(config: CorpusConfig) -> list[object]:
    """What decides, beside the text, on which documents a corpus has and how they are split."""
    return [
        config.val_fraction,
        config.text_field,
        config.dedup and config.dedup.name,
        config.ascii_only,
        config.length and config.length.name,
        config.max_bytes,
        config.on_error.name,
    ]


def read_corpus(
    find: Callable[[int | None], tuple[list[TextFile], bool]],
    config: CorpusConfig,
    rules: Rules,
    work: Path,
    say: Say,
    *,
    subject: str,
    check: Callable[[Path], None] = lambda path: None,
    processes: int | None = None,
    counts: Callable[[], dict[str, int]] = dict,
) -> Corpus:
    """Scan files and choose among their documents.

    Args:
        find: the files that are enough for so many bytes of text that passes the filters, None for all, and whether there are more.
        subject: what a problem with the text as a whole is reported under.
        check: raises ConfigError if a file has changed.
        counts: of what was dropped before it came into the files; they are added to the corpus's own.

    Raises:
        ConfigError: broken items, unless they are skipped, or no text for one of the sides.
    """
    start = time.perf_counter()
    limit = config.max_bytes
    scans = work / "scan"
    while True:
        files, more = find(limit)
        scan = scan_files(files, rules, scans, limit, say, processes)
        if limit is None:
            _refuse(scan.problems(scan.items), config, scans)
        selection = select(scan, config, scans, say)
        problems = scan.problems(selection.items)
        _refuse(problems, config, scans)
        if limit is None or config.max_bytes is None or selection.text_bytes >= config.max_bytes or (scan.complete and not more):
            break
        # What was dropped as a duplicate is missing; as much again will be dropped of what replaces it.
        missing = config.max_bytes - selection.text_bytes
        limit += max(limit // 100, min(limit, missing * limit // max(selection.text_bytes, 1))) + 1
    for place, rule in _once_each(problems)[:SAID_PROBLEMS]:
        say(f"Left out: {place} {rule}")
    totals = selection.counts.copy()
    for key, count in counts().items():
        totals[key] = totals.get(key, 0) + count
    if not selection.kept:
        shutil.rmtree(scans, ignore_errors=True)
        raise ConfigError([(subject, _nothing(totals))], scope="the data")
    dropped = _left_out(totals)
    summary = f"Read {_summary(totals, selection.text_bytes)} in {time.perf_counter() - start:.1f} s"
    say(f"{summary}, dropped {dropped}" if dropped else summary)
    looked_at = [] if rules.unix_line_ends else files[:LOOKED_AT_FILES]
    if windows := [file.path for file in looked_at if has_windows_line_ends(file)]:
        which = str(windows[0]) + (" and others end their" if len(windows) > 1 else " ends its")
        say(f"{which} lines with \\r\\n, as Windows does, and the model learns that; data.unix_line_ends=true reads \\n instead")
    documents = selected_documents([file for file, _ in scan.files], selection, rules, scans, check)
    if selection.kept < MIN_DOCUMENTS:
        return _cut(documents, config.val_fraction, selection, totals)
    return Corpus(documents, selection.kept, selection.text_bytes, totals)


def _refuse(problems: list[Problem], config: CorpusConfig, scans: Path) -> None:
    """End at what cannot be read, if that is to stop the preparation."""
    if problems and config.on_error is OnError.stop:
        shutil.rmtree(scans, ignore_errors=True)  # of no use to the next command, which finds other text or goes by other rules
        *others, (subject, rule) = _once_each(problems)
        raise ConfigError([*others, (subject, f"{rule}; data.on_error=skip leaves out what cannot be read")], scope="the data")


def _once_each(problems: list[Problem]) -> list[Problem]:
    """Problems, a wrong field once, where it is met first: it is wrong in every line. Others are each worth their place."""
    places: dict[tuple[str, str], list[str]] = {}
    for subject, rule in problems:
        places.setdefault(("" if rule.startswith("has no ") else subject, rule), []).append(subject)
    more = "at least " if len(problems) >= MAX_PROBLEMS else ""
    return [
        (first, f"{rule} (so it is in {more}{len(others)} more place{'s' if len(others) > 1 else ''})" if others else rule)
        for (_, rule), (first, *others) in places.items()
    ]


def _cut(
    documents: Callable[[int], Iterator[tuple[Side, Document]]], val_fraction: float, selection: Selection, counts: dict[str, int]
) -> Corpus:
    """The first bytes of all documents together, and the last."""
    size = selection.text_bytes
    cut = int(size * (1 - val_fraction))

    def parts() -> Iterator[tuple[Side, Document]]:
        position = 0
        for _, document in documents(0):
            before, after = _split_at_byte(document.text, cut - position)
            position += len(document.text.encode())
            for side, text in ((Side.train, before), (Side.val, after)):
                if text:
                    yield side, Document(document.name, text, document.item)

    count, filled = 0, set()
    for side, document in parts():
        count += 1
        if not document.text.isspace():
            filled.add(side)
    for side, purpose in ((Side.train, "train on"), (Side.val, "validate on")):
        if side not in filled:
            rule = f"leaves nothing to {purpose} of {size:,} bytes of text; give more text or another data.val_fraction"
            raise ConfigError([(f"data.val_fraction={val_fraction}", rule)], scope="the data")
    return Corpus(lambda first: islice(parts(), first, None), count, size, counts)


def _split_at_byte(text: str, byte: int) -> tuple[str, str]:
    """A text up to a byte of its UTF-8 and from there on; a character that the byte stands in goes to the second part."""
    raw = text.encode()
    byte = min(max(byte, 0), len(raw))
    while 0 < byte < len(raw) and raw[byte] & 0xC0 == 0x80:
        byte -= 1
    return raw[:byte].decode(), raw[byte:].decode()


def _summary(counts: dict[str, int], size: int) -> str:
    kept = counts["kept"]
    return f"{kept:,} document{'' if kept == 1 else 's'} of {size / 1e6:,.2f} MB"


def _left_out(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[key]:,} {words}" for key, words in LEFT_OUT.items() if counts.get(key))


def _nothing(counts: dict[str, int]) -> str:
    if counts["read"] == counts.get("empty", 0):
        return "holds no text: every file or text in it is empty"
    return f"holds no text that is kept: of {counts['read']:,} documents, {_left_out(counts)}"


def find_files(typed: str) -> list[TextFile]:
    """Files at or below a path, or that a pattern matches, in the order of their names; hidden ones are passed over.

    Links to folders are followed. A folder that can be reached in several ways is read once, so a link to a folder above it ends.

    Args:
        typed: a file, a folder that is searched with all below it, a pattern such as `data/**/*.jsonl.gz`, or `-` for the standard
            input, which is read to its end once and kept in the cache for as long as it is needed.

    Raises:
        ConfigError: there is no file that could be read.
    """

    def refuse(rule: str) -> ConfigError:
        return ConfigError([(f"data.path={typed}", rule)], scope="the data")

    if ADDRESS.match(typed):
        rule = "is an address; fetch it, for example with curl -LO, and name the file"
        raise refuse(f"{rule} (sets of the Hugging Face hub are streamed: data=fineweb_edu data.dataset=NAME)")
    if typed == "-":
        path = _standard_input()
        return [TextFile(path, path.name)]
    root = Path(typed).expanduser()
    if root.is_file():
        if form_of(root) is None:
            raise refuse(f"is {f'a {root.suffix} file' if root.suffix else 'a file without suffix'}; use {READABLE}")
        return [TextFile(root, root.name)]
    if root.is_dir():
        found = set(_below([root]))
        if not found:
            raise refuse(f"holds no {READABLE} file")
    elif has_magic(typed):
        fixed = next(number for number, part in enumerate(root.parts) if has_magic(part))
        root, pattern = Path(*root.parts[:fixed]), root.parts[fixed:]
        matches = _matches(root, pattern)
        direct = [match for match in matches if form_of(match) is not None and not match.is_dir()]
        found = _once([*direct, *_below([match for match in matches if match.is_dir()])])
        if not found:
            raise refuse(f"matches {f'no {READABLE} file' if matches else 'nothing'} in {root.absolute()}")
    else:
        parent = next(folder for folder in root.absolute().parents if folder.is_dir())
        name, meant = root.absolute().relative_to(parent).parts[0], or_meant(root, "")
        raise refuse(f"does not exist: there is no {name} in {parent}" + (f"; {meant}" if meant else ""))
    files = [TextFile(path, path.relative_to(root).as_posix()) for path in found]
    return sorted(files, key=lambda file: file.name)


def _matches(root: Path, pattern: tuple[str, ...]) -> list[Path]:
    """What the parts of a pattern match below a folder. `Path.glob` itself does not look for `**` behind links."""
    found = [root]
    while "**" in pattern:
        place = pattern.index("**")
        found = [folder for folder, _ in _folders(_globbed(found, pattern[:place]))]
        pattern = pattern[place + 1 :]
    return _globbed(found, pattern)


def _globbed(folders: list[Path], pattern: tuple[str, ...]) -> list[Path]:
    if not pattern:
        return folders
    matches = ((folder, match) for folder in folders for match in folder.glob(str(Path(*pattern))))
    return [match for folder, match in matches if not any(map(_hidden, match.relative_to(folder).parts))]


def _once(files: list[Path]) -> set[Path]:
    """Files without those that are the same again, behind another link to their folder."""
    real, detour = functools.cache(os.path.realpath), functools.cache(_detour)
    found: dict[tuple[str, str], Path] = {}
    for file in sorted(files, key=lambda file: (detour(file.parent), file)):
        found.setdefault((real(file.parent), file.name), file)
    return set(found.values())


def _below(roots: list[Path]) -> Iterator[Path]:
    """The files in some folders, and in those below them, that can be read."""
    for folder, files in _folders(roots):
        yield from (folder / file for file in files if not _hidden(file) and form_of(Path(file)) is not None)


def _folders(roots: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Some folders and those below them, behind links too, each with the names of its files.

    Each is there once. Where it can be reached in several ways it has the name with the fewest links in it, and of those the first:
    the order in which the file system lists them decides nothing.
    """
    seen: set[str] = set()
    while roots:
        links: list[Path] = []
        for root in sorted(roots, key=lambda root: (_detour(root), root)):
            for folder, names, files in os.walk(root):
                names[:] = [name for name in names if not _hidden(name)]
                if (real := os.path.realpath(folder)) in seen:
                    names.clear()
                    continue
                seen.add(real)
                links += [path for path in (Path(folder, name) for name in names) if path.is_symlink()]
                yield Path(folder), files
        roots = links


def _detour(folder: Path) -> int:
    """Links in a folder's name."""
    return sum(part.is_symlink() for part in (folder, *folder.parents))


def _hidden(name: str) -> bool:
    return name.startswith(".")


@functools.cache
def _standard_input() -> Path:
    """Copy the standard input into a hidden folder of the cache that is named by its content, once in a process.

    It counts as .jsonl if its first character that is no white space is `{`, else as one text. It goes with the process, unless a
    preparation of it was interrupted: the same input given again is gone on with. `llama-lab cache clean` removes what is left.
    """

    def refuse(rule: str) -> ConfigError:
        return ConfigError([("data.path=-", rule)], scope="the data")

    if sys.stdin is None or sys.stdin.isatty():
        raise refuse("reads the standard input, which is the terminal; pipe text into the command")
    with writing_cache():
        prepared_root().mkdir(parents=True, exist_ok=True)
        draft = prepared_root() / f".input.{secrets.token_hex(4)}"
        found, beginning = hashlib.sha256(), b""
        try:
            with draft.open("wb") as file:
                while block := sys.stdin.buffer.read(BLOCK_BYTES):
                    beginning = beginning or block.lstrip()[:1]
                    found.update(block)
                    file.write(block)
            if not beginning:
                raise refuse("reads the standard input, which is empty; give a file to a command that reads more than once")
            folder = prepared_root() / f".input-{found.hexdigest()[:16]}"
            folder.mkdir(exist_ok=True)
            mark_used(folder)
            held = ExitStack()
            held.enter_context(in_use(folder))
            path = folder / ("input.jsonl" if beginning == b"{" else "input.txt")
            if not path.exists():  # the same content keeps its date, so that its hash is remembered
                draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    atexit.register(_let_go, path, held)
    return path


def _let_go(path: Path, held: ExitStack) -> None:
    """Remove a copy of the standard input, unless the next command goes on with it or another process reads it."""
    held.close()
    if path not in _going_on:
        for entry in entries():
            if entry.path == path.parent:
                remove(entry)


def _stat(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError([(str(path), f"cannot be read: {error.strerror or error}")], scope="the data")
