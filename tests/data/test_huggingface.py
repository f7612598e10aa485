"""Data sets of the Hugging Face hub, by local folders of the same shape; the hub itself is out of reach of tests."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import BytesConfig, Dedup, HuggingFaceConfig, Length, OnError, TextConfig
from llama_lab.data import huggingface
from llama_lab.data.cache import ContentHashes
from llama_lab.data.corpus import Corpus
from llama_lab.data.huggingface import HuggingFaceSource
from llama_lab.data.prepare import prepare
from llama_lab.data.text import TextSource

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def fineweb(tmp_path: Path) -> Path:
    """A folder as HuggingFaceFW/fineweb-edu is one: tables of texts among other columns, below data/."""
    chance = random.Random(0)
    folder = tmp_path / "fineweb-edu" / "data" / "CC-MAIN-2024-10"
    folder.mkdir(parents=True)
    for shard in range(3):
        rows = []
        for number in range(400):
            text = (
                f"document {chance.randint(0, 900)} " + chance.choice(["", "größe ", "plain "]) + "x" * chance.choice([0, 50, 7490])
            )
            rows.append(
                {
                    "text": " " if number % 50 == 7 else text,
                    "id": f"<urn:uuid:{shard}-{number}>",
                    "dump": "CC-MAIN-2024-10",
                    "url": "https://example.org/",
                    "file_path": "s3://somewhere",
                    "language": "en",
                    "language_score": 0.95,
                    "token_count": len(text) // 4,
                    "score": 2.6,
                    "int_score": 3,
                }
            )
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{shard:05}-of-00003.parquet", row_group_size=100)
    return folder.parents[1]


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A folder as roneneldan/TinyStories is one, with a split for validation, but of .jsonl files."""
    folder = tmp_path / "TinyStories"
    folder.mkdir()
    for split, count in (("train", 60), ("validation", 25)):
        lines = [json.dumps({"text": f"Once upon a time there was a {split} story number {number}."}) for number in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config(folder: Path, **changes: Any) -> HuggingFaceConfig:
    node = HuggingFaceConfig(dataset=str(folder), subset=None, split="train", revision=None, val_fraction=0.2)
    return replace(node, **changes)


def read(chosen: HuggingFaceConfig, work: Path) -> Corpus:
    return HuggingFaceSource(chosen, ContentHashes()).corpus(lambda sentence: None, work)


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"ascii_only": True, "length": Length.short},
        {"max_bytes": 500_000},
        {"max_bytes": 30_000, "ascii_only": True, "dedup": None},
        {"dedup": Dedup.near},
    ],
)
def test_it_is_the_text_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fineweb: Path, rules: dict[str, Any]) -> None:
    monkeypatch.setattr(huggingface, "PART_BYTES", 100_000)
    streamed = read(config(fineweb, **rules), tmp_path / "work")
    files = TextSource(TextConfig(path=str(fineweb), val_fraction=0.2, **rules), ContentHashes()).corpus(print, tmp_path / "files")
    found, wanted = list(streamed.documents(0)), list(files.documents(0))
    assert [(side, document.text) for side, document in found] == [(side, document.text) for side, document in wanted]
    assert (streamed.count, streamed.text_bytes, streamed.counts) == (files.count, files.text_bytes, files.counts)
    assert streamed.counts["read"] == sum(count for key, count in streamed.counts.items() if key != "read")
    assert list(streamed.documents(77)) == found[77:]
    # Numbers are those of the rows, whichever were dropped and whichever part they lie in.
    rows = [row for path in sorted(fineweb.rglob("*.parquet")) for row in pq.read_table(path)["text"].to_pylist()]
    assert {document.name for _, document in found} == {"fineweb-edu/train"}
    assert all(document.text in rows[document.item - 1] for _, document in found)


def test_a_split_is_chosen(tmp_path: Path, stories: Path) -> None:
    corpus = read(config(stories, split="validation"), tmp_path / "work")
    texts = [document.text for _, document in corpus.documents(0)]
    assert texts == [f"Once upon a time there was a validation story number {number}." for number in range(25)]
    assert read(config(stories), tmp_path / "other").count == 60


def test_another_column_may_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text("\n".join(json.dumps({"id": 1, "story": f"story {n}"}) for n in range(30)))
    assert read(config(tmp_path / "own", text_field="story"), tmp_path / "work").count == 30
    with pytest.raises(ConfigError, match=r"data\.text_field=text is no column of .*own; it has id, story"):
        read(config(tmp_path / "own"), tmp_path / "other")


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_stream_goes_on_where_the_last_part_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fineweb: Path) -> None:
    program = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from llama_lab.config.schema import HuggingFaceConfig\n"
        "from llama_lab.data import huggingface, scan\n"
        "from llama_lab.data.cache import ContentHashes\n"
        "huggingface.PART_BYTES = 100_000\n"
        "read = huggingface._Spool._next\n"
        "def read_or_die(spool, row):\n"
        "    if len(spool._parts) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(spool, row)\n"
        "huggingface._Spool._next = read_or_die\n"
        f"config = HuggingFaceConfig(dataset={str(fineweb)!r}, subset=None, split='train', revision=None, val_fraction=0.2)\n"
        f"huggingface.HuggingFaceSource(config, ContentHashes()).corpus(print, Path({str(tmp_path / 'work')!r}))\n"
    )
    spool = tmp_path / "work" / "spool"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL, timeout=170)
    assert killed.returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in spool.glob("*.zst")}
    assert len(done) == 3
    monkeypatch.setattr(huggingface, "PART_BYTES", 100_000)
    said: list[str] = []
    corpus = HuggingFaceSource(config(fineweb), ContentHashes()).corpus(said.append, tmp_path / "work")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert ", going on after " in said[0]
    fresh = read(config(fineweb), tmp_path / "fresh")
    assert corpus.counts == fresh.counts
    assert list(corpus.documents(0)) == list(fresh.documents(0))


def test_what_is_fetched_is_not_fetched_again(tmp_path: Path, fineweb: Path) -> None:
    first = read(config(fineweb, ascii_only=True), tmp_path / "work")
    for path in fineweb.rglob("*.parquet"):
        path.unlink()
    again = read(config(fineweb, ascii_only=True), tmp_path / "work")
    assert again.counts == first.counts
    assert list(again.documents(5)) == list(first.documents(5))


def test_the_disk_holds_what_is_kept(tmp_path: Path, fineweb: Path) -> None:
    from llama_lab.data.reading import zstd

    corpus = read(config(fineweb, length=Length.medium, max_bytes=100_000), tmp_path / "work")
    (part,) = (tmp_path / "work" / "spool").glob("*.zst")
    lines = zstd("a test").decompress(part.read_bytes()).splitlines()
    assert sum(len(json.loads(line)["text"]) >= 7500 for line in lines if line) == sum(1 for line in lines if line)
    assert 100_000 <= corpus.text_bytes < 108_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, r"data\.split=test cannot be found: Bad split: test\. Available splits: \['train'\]"),
        ({"subset": "sample-10BT"}, r"data\.subset=sample-10BT .* cannot be found: BuilderConfig 'sample-10BT' not found"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, fineweb: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(config(fineweb, **changes), tmp_path / "work")


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "from llama_lab.config.schema import HuggingFaceConfig\n"
        "from llama_lab.data.cache import ContentHashes\n"
        "from llama_lab.data.huggingface import HuggingFaceSource\n"
        "config = HuggingFaceConfig(dataset='no/such', subset=None, split='train', revision=None, val_fraction=0.2)\n"
        "try:\n"
        f"    HuggingFaceSource(config, ContentHashes()).corpus(print, Path({str(tmp_path / 'work')!r}))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    offline = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, timeout=170)
    assert "ConfigError 1 problem in the data" in done.stdout, done.stderr
    assert "data.dataset=no/such cannot be read: " in done.stdout
    assert "when the hub can be reached again, the same command goes on from what was fetched" in done.stdout


def test_rows_without_text_are_named_or_left_out(tmp_path: Path, stories: Path) -> None:
    with (stories / "train.jsonl").open("a") as file:
        file.write('{"text": null}\n{"text": ""}\n{"text": "the last"}\n')
    with pytest.raises(ConfigError, match=r"TinyStories row 61 has a null as `text`; it must be a string; data\.on_error=skip"):
        read(config(stories), tmp_path / "work")
    said: list[str] = []
    source = HuggingFaceSource(config(stories, on_error=OnError.skip), ContentHashes())
    corpus = source.corpus(said.append, tmp_path / "other")
    assert corpus.counts == {"read": 63, "kept": 61, "empty": 1, "broken": 1}
    assert said[1] == f"Left out: {stories} row 61 has a null as `text`; it must be a string"
    assert said[2].endswith(", dropped 1 empty, 1 that cannot be read")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_linked_folder_is_left_out_and_that_is_said(tmp_path: Path, stories: Path) -> None:
    rows = read(config(stories), tmp_path / "work").counts["read"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "train.jsonl").write_text('{"text": "from elsewhere"}\n', encoding="utf-8")
    (stories / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    said: list[str] = []
    source = HuggingFaceSource(config(stories), ContentHashes())
    assert source.corpus(said.append, tmp_path / "other").counts["read"] == rows
    assert said[0] == (
        f"Left out: {stories / 'more'} is a link to a folder, which `datasets` does not follow; data=text data.path={stories} does"
    )


def test_a_broken_table_points_to_the_source_that_names_it(tmp_path: Path, fineweb: Path) -> None:
    path = sorted(fineweb.rglob("*.parquet"))[1]
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    raw[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"cannot be read after \d+ documents: .*; data=text data\.path=.* names what is broken"):
        read(config(fineweb), tmp_path / "work")


def test_the_fingerprint_is_that_of_what_is_meant(tmp_path: Path, stories: Path) -> None:
    def fingerprint(**changes: Any) -> str:
        return HuggingFaceSource(config(stories, **changes), ContentHashes()).fingerprint()

    first = fingerprint()
    stories.rename(tmp_path / "moved")
    assert fingerprint(dataset=str(tmp_path / "moved")) == first
    (tmp_path / "moved").rename(stories)
    others = [fingerprint(split="validation"), fingerprint(ascii_only=True), fingerprint(max_bytes=5), fingerprint(dataset="a/b")]
    (stories / "more.jsonl").write_text('{"text": "more"}')
    others.append(fingerprint())
    assert len({first, *others}) == 6


def test_a_folder_that_changes_meanwhile_is_named(tmp_path: Path, stories: Path) -> None:
    source = HuggingFaceSource(config(stories), ContentHashes())
    source.fingerprint()
    source.check_unchanged()
    (stories / "train.jsonl").write_text('{"text": "other"}')
    with pytest.raises(ConfigError, match=r"train\.jsonl changed while it was being read; run the command again"):
        source.check_unchanged()


def test_it_is_prepared_like_any_text(stories: Path) -> None:
    said: list[str] = []
    data = prepare(config(stories), BytesConfig(), said.append)
    assert data.train.documents + (data.val.documents if data.val else 0) == 60
    assert not [path for path in data.folder.rglob("*") if "spool" in path.name or "scan" in path.name]
    count = len(said)
    assert prepare(config(stories), BytesConfig(), said.append).fingerprint == data.fingerprint
    assert len(said) == count
