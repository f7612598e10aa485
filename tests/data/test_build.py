"""Building a prepared folder: the same bytes however often it was stopped, and nothing that is half done counts."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import BpeConfig, BytesConfig, TextConfig
from llama_lab.data import build as building
from llama_lab.data import writer as writing
from llama_lab.data.build import build
from llama_lab.data.cache import entries, prepared_root
from llama_lab.data.corpus import Corpus, Document, Side
from llama_lab.data.draft import FolderWriter
from llama_lab.data.place import Place, Stopped, making
from llama_lab.data.prepare import open_prepared, prepare
from llama_lab.data.shards import SOURCES
from llama_lab.data.writer import SourceNames, SplitWriter

ROOT = Path(__file__).parents[2]
EOS = 1
# More by hand: KILLS=10 pytest -n 0 tests/data/test_build.py -k kill
KILLS = int(os.environ.get("KILLS", "4"))
PROGRAM = """
import sys
from pathlib import Path
from llama_lab.config.schema import BpeConfig, BytesConfig, TextConfig
from llama_lab.data import build
from llama_lab.data.prepare import prepare
build.SAVE_SECONDS = build.SAY_SECONDS = 0.01
path, tokenizer, out = sys.argv[1:]
config = BytesConfig() if tokenizer == "bytes" else BpeConfig(vocab_size=int(tokenizer))
prepare(TextConfig(path=path, val_fraction=0.1), config, lambda text: print(text, flush=True), out=Path(out))
"""

# Put before it.
DIES_WHILE_ENCODING = """
import os, signal
from llama_lab.data.draft import FolderWriter
save = FolderWriter.save
def save_and_die(writer):
    save(writer)
    if writer.documents > 100:
        os.kill(os.getpid(), signal.SIGKILL)
FolderWriter.save = save_and_die
"""


def words(chance: random.Random, count: int) -> str:
    syllables = ["ka", "to", "mi", "ren", "sol", "ü", "dra", "pe", "lun", "os"]
    return " ".join("".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(count))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A megabyte of documents without meaning."""
    chance = random.Random(7)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": words(chance, chance.randint(10, 700))}) for _ in range(400)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def start(text: Path, tokenizer: str, out: Path, prefix: str = "") -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-c", prefix + PROGRAM, str(text), tokenizer, str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def untouched(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """What a process that nobody stops makes of the text, and how many seconds it takes."""
    out = tmp_path_factory.mktemp("untouched") / "out"
    began = time.perf_counter()
    process = start(text, "400", out)
    _, errors = process.communicate(timeout=170)
    assert process.returncode == 0, errors
    return contents(out), time.perf_counter() - began


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_kill_at_any_moment_changes_no_byte(seed: int, text: Path, untouched, tmp_path: Path) -> None:
    expected, seconds = untouched
    chance, out = random.Random(seed), tmp_path / "out"
    for _ in range(2):
        process = start(text, "400", out)
        try:
            process.wait(timeout=chance.uniform(0.1, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate(timeout=170)
        assert not out.exists() or contents(out) == expected
    process = start(text, "400", out)
    _, errors = process.communicate(timeout=170)
    assert (process.returncode, errors) == (0, "")
    assert contents(out) == expected
    assert list(tmp_path.glob(".out*")) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_kill_while_encoding_loses_little(text: Path, untouched, tmp_path: Path) -> None:
    process = start(text, "400", tmp_path / "out", DIES_WHILE_ENCODING)
    process.communicate(timeout=170)
    assert process.returncode == -signal.SIGKILL
    said, _ = start(text, "400", tmp_path / "out").communicate(timeout=170)
    assert "Going on where an earlier command stopped: " in said
    assert "Trained" not in said
    assert contents(tmp_path / "out") == untouched[0]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_after_a_full_disk_it_goes_on(text: Path, tmp_path: Path) -> None:
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))\n"
    slow = "from llama_lab.data import writer\nwriter.BUFFER_TOKENS = 1000\n"
    full = start(text, "bytes", tmp_path / "out", limit + slow)
    _, errors = full.communicate(timeout=170)
    assert full.returncode == 1
    limit = "lift the limit on the size of a file (ulimit -f shows it) and type the same command again"
    assert f"--out {tmp_path / 'out'} cannot be written: File too large; {limit}" in errors
    assert not (tmp_path / "out").exists()
    again = start(text, "bytes", tmp_path / "out")
    _, errors = again.communicate(timeout=170)
    assert (again.returncode, errors) == (0, "")
    fresh = start(text, "bytes", tmp_path / "fresh")
    fresh.communicate(timeout=170)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_processes_that_start_together_make_one_folder(text: Path, untouched, tmp_path: Path) -> None:
    processes = [start(text, "400", tmp_path / "out") for _ in range(3)]
    outputs = [process.communicate(timeout=170) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum("Trained" in said for said, _ in outputs) == 1
    assert contents(tmp_path / "out") == untouched[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Books:
    """Documents of a few sources, on both sides in turn."""

    name = "books"

    def __init__(self, texts: list[tuple[str, str, int]], changed: bool = False):
        self._texts, self._changed = texts, changed
        self.work: list[list[str]] = []
        self.reads: list[int] = []

    def fingerprint(self) -> str:
        return "books"

    def corpus(self, say, work: Path) -> Corpus:
        self.work.append(sorted(path.name for path in work.iterdir()))
        (work / "found").write_text("something expensive")
        size = sum(len(text.encode()) for _, text, _ in self._texts)
        return Corpus(self._documents, len(self._texts), size, {"read": len(self._texts) + 2, "kept": len(self._texts), "empty": 2})

    def _documents(self, first: int) -> Iterator[tuple[Side, Document]]:
        self.reads.append(first)
        for place, (name, text, item) in islice(enumerate(self._texts), first, None):
            yield Side.val if place % 3 == 2 else Side.train, Document(name, text, item)

    def check_unchanged(self) -> None:
        if self._changed:
            raise ConfigError([("books", "changed")], scope="the data")


def books(count: int = 30, changed: bool = False) -> Books:
    chance = random.Random(1)
    return Books([(f"b{place // 4}\n.jsonl", words(chance, 40), place % 4 + 1) for place in range(count)], changed)


def make(out: Path, source: Books, tokenizer=None, say=lambda text: None) -> None:
    with making(Place.at(out, "--out"), "key", say) as draft:
        assert draft is not None
        build(draft, source, tokenizer or BytesConfig(), "key", say)


def test_documents_are_named_by_their_source_and_number(tmp_path: Path) -> None:
    make(tmp_path / "out", books())
    prepared = open_prepared(tmp_path / "out")
    assert prepared.val is not None
    assert [prepared.val.document_name(n) for n in range(3)] == ["b0\n.jsonl:3", "b1\n.jsonl:2", "b2\n.jsonl:1"]
    assert [prepared.train.document_name(n) for n in (0, 1, 2)] == ["b0\n.jsonl:1", "b0\n.jsonl:2", "b0\n.jsonl:4"]
    assert len((tmp_path / "out" / SOURCES).read_text().splitlines()) == 8
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["counts"] == {"read": 32, "kept": 30, "empty": 2}
    assert manifest["tokenizer"]["special_ids"] == {"<EOS>": 256}
    assert (manifest["splits"]["train"]["documents"], manifest["splits"]["val"]["documents"]) == (20, 10)
    assert not (tmp_path / "out" / "work").exists()


def test_every_stop_between_two_documents_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process: an interruption after each document in turn, in the same draft."""
    monkeypatch.setattr(building, "SAVE_SECONDS", -1.0)
    make(tmp_path / "whole", books())
    said: list[str] = []
    real = FolderWriter.add

    def add(self: FolderWriter, *args) -> None:
        real(self, *args)
        if self.documents in stops:
            stops.remove(self.documents)
            self.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderWriter, "add", add)
    stops = list(range(1, 31))
    sources = []
    for _ in range(30):
        sources.append(books())
        with pytest.raises(Stopped):
            make(tmp_path / "stopped", sources[-1], say=said.append)
    assert "what is done is kept in" in said[-1]
    make(tmp_path / "stopped", books())
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert sources[0].work == [[]]
    assert all(source.work == [["found"]] for source in sources[1:])
    assert [source.reads for source in sources] == [[place] for place in range(30)]


def test_nothing_is_kept_of_text_that_changed_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="books changed"):
        make(tmp_path / "out", books(changed=True))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_draft_that_was_tampered_with_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "whole", books())
    monkeypatch.setattr(building, "SAVE_SECONDS", -1.0)
    place = Place.at(tmp_path / "out", "--out")
    for damage in (
        lambda draft: (draft / "train-00000.bin").write_bytes(b"x"),
        lambda draft: (draft / "val-ids.bin").unlink(),
        lambda draft: (draft / "progress.npz").write_bytes(b"PK"),
        lambda draft: (draft / SOURCES).unlink(),
    ):
        with pytest.raises(Stopped), making(place, "key", print) as draft:
            assert draft is not None
            interrupted(draft)
        damage(place.draft)
    make(tmp_path / "out", books())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupted(draft: Path) -> None:
    """Build until the tenth document is written."""

    class Interrupting(Books):
        def _documents(self, first: int) -> Iterator[tuple[Side, Document]]:
            yield from islice(super()._documents(first), 10 - first)
            raise KeyboardInterrupt

    source = books()
    build(draft, Interrupting(source._texts), BytesConfig(), "key", print)


def test_a_draft_for_something_else_is_removed(tmp_path: Path) -> None:
    place = Place.at(tmp_path / "out", "--out")
    with pytest.raises(Stopped), making(place, "other", print) as draft:
        assert draft is not None
        interrupted(draft)
    assert place.draft.exists()
    source = books()
    make(tmp_path / "out", source)
    assert source.work == [[]]
    assert source.reads == [0]


def test_a_folder_of_others_with_the_draft_s_name_is_left_alone(tmp_path: Path) -> None:
    place = Place.at(tmp_path / "out", "--out")
    place.draft.mkdir()
    (place.draft / "thesis.txt").write_text("the only copy")
    with pytest.raises(ConfigError, match=r"\.out\.partial is in the way and was not left by this command"):
        make(tmp_path / "out", books())
    assert (place.draft / "thesis.txt").exists()


def test_an_unfinished_entry_is_listed_and_cleaned(text: Path) -> None:
    place = Place.in_cache("books-bytes-0123")
    with pytest.raises(Stopped), making(place, "key", print) as draft:
        assert draft is not None
        interrupted(draft)
    (entry,) = entries()
    assert (entry.name, entry.kind) == (".books-bytes-0123.partial", "unfinished")
    assert entry.bytes > 1000


def test_a_closed_pipe_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def say(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        make(tmp_path / "out", books(), say=say)


@pytest.mark.parametrize("shard_tokens", [1, 3, 1000])
def test_a_split_goes_on_from_any_document(tmp_path: Path, shard_tokens: int) -> None:
    chance = np.random.default_rng(0)
    documents = [chance.integers(0, 300, size=size).astype(np.uint32) for size in (5, 0, 1, 9, 3)]

    def writer(folder: Path, **more) -> SplitWriter:
        folder.mkdir(exist_ok=True)
        return SplitWriter(folder, "train", vocab_size=300, eos_id=EOS, shard_tokens=shard_tokens, **more)

    with writer(tmp_path / "whole") as whole:
        for place, ids in enumerate(documents):
            whole.add(ids, 2 * len(ids), source=place, item=1)
        expected = whole.close()
    for stop in range(len(documents) + 1):
        folder = tmp_path / str(stop)
        with writer(folder) as first:
            for place, ids in enumerate(documents[:stop]):
                first.add(ids, 2 * len(ids), source=place, item=1)
            state = json.loads(json.dumps(first.checkpoint()))
            counts = first.counts.copy()
            for ids in [*documents[stop:], documents[3]]:  # written, but not counted as done
                first.add(np.repeat(ids[::-1], 2), 1)
            first.checkpoint()
        with writer(folder, state=state, counts=counts) as second:
            for place, ids in enumerate(documents[stop:], start=stop):
                second.add(ids, 2 * len(ids), source=place, item=1)
            assert second.close() == expected
            assert second.counts.tolist() == whole.counts.tolist()
        assert contents(folder) == contents(tmp_path / "whole")


def test_names_beyond_memory_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_NAMES", 3)
    names = ["a", "b", "a", "c", "d", "a", 'e"\n', "d", "\udc80", "a", "b"]

    def numbers(folder: Path, stop: int) -> list[int]:
        folder.mkdir()
        first = SourceNames(folder)
        found = [first.number(name) for name in names[:stop]]
        size = first.checkpoint()
        first.number("lost")
        first.release()
        second = SourceNames(folder, size)
        found += [second.number(name) for name in names[stop:]]
        second.close()
        return found

    expected = numbers(tmp_path / "whole", len(names))
    lines = (tmp_path / "whole" / SOURCES).read_text().splitlines()
    assert [json.loads(lines[number]) for number in expected] == names
    assert len(lines) > len(set(names)), "else all names would be held in memory"
    for stop in range(len(names)):
        assert numbers(tmp_path / str(stop), stop) == expected
        assert contents(tmp_path / str(stop)) == contents(tmp_path / "whole")


def test_baselines_take_the_first_validation_documents(text: Path) -> None:
    from llama_lab.data.baselines import compression_bits_per_byte

    prepared = prepare(TextConfig(path=str(text), val_fraction=0.1), BytesConfig(), lambda said: None)
    val = prepared.val
    assert val is not None
    starts = val.document_starts
    joined = b"\n\n".join(bytes(val.read(a + 1, b).astype(np.uint8)) for a, b in pairwise(starts))
    assert compression_bits_per_byte(joined).items() <= prepared.baselines.items()


def test_progress_says_how_long_it_will_take(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "SAY_SECONDS", -1.0)
    said: list[str] = []
    prepare(TextConfig(path=str(text), val_fraction=0.1), BpeConfig(vocab_size=300), said.append)
    lines = [line for line in said if line.endswith(" left")]
    assert len(lines) > 100
    assert lines[-1].startswith("Encoded 1 of 1 MB (100 %) at ")
    assert [path for path in prepared_root().iterdir() if path.is_dir()]
