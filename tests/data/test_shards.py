"""Shards: what is written is read, across files, and what was changed afterwards is refused."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.data import shards, writer
from llama_lab.data.shards import Split, content_fingerprint, open_split, read_manifest, token_dtype, verify_shards
from llama_lab.data.writer import SplitWriter, write_manifest

EOS = 1


def write(folder: Path, documents: list[list[int]], *, vocab_size: int = 300, shard_tokens: int = 1000) -> Split:
    """A folder with one split; a document has twice as many bytes as tokens."""
    folder.mkdir(exist_ok=True)
    with SplitWriter(folder, "train", vocab_size=vocab_size, eos_id=EOS, shard_tokens=shard_tokens) as split_writer:
        for ids in documents:
            split_writer.add(np.array(ids, dtype=np.uint32), 2 * len(ids))
        described = split_writer.close()
    manifest = {
        "format_version": shards.FORMAT_VERSION,
        "token_dtype": token_dtype(vocab_size).name,
        "tokenizer": {"hash": "h", "vocab_size": vocab_size, "eos_id": EOS},
        "splits": {"train": described},
        "source": {"data": "test", "tokenizer": "test"},
    }
    write_manifest(folder, manifest)
    split = open_split(folder, read_manifest(folder, "it"), "train")
    assert split is not None
    return split


def sequence(documents: list[list[int]]) -> list[int]:
    return [EOS] + [id for ids in documents for id in [*ids, EOS]]


@pytest.mark.parametrize("shard_tokens", [1, 2, 7, 1000])
def test_every_range_is_read_across_files(tmp_path: Path, shard_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BUFFER_TOKENS", 5)
    monkeypatch.setattr(shards, "MAX_MAPPED", 3)
    documents = [[5, 6, 7], [], [8] * 9, [9]]
    split = write(tmp_path / "a", documents, shard_tokens=shard_tokens)
    whole = sequence(documents)
    assert (split.tokens, split.documents, split.text_bytes) == (len(whole), 4, 26)
    assert len(split.files) == -(-len(whole) // shard_tokens)
    for start in range(split.tokens + 1):
        for stop in range(start, split.tokens + 1):
            if start < split.tokens:
                assert split.read(start, stop).tolist() == whole[start:stop]
    assert [whole[start] for start in split.document_starts] == [EOS] * 5
    assert np.diff(split.document_starts).tolist() == [4, 1, 10, 2]
    with pytest.raises(IndexError):
        split.read(0, split.tokens + 1)


def test_bytes_before_counts_whole_documents_exactly_and_shares_in_proportion(tmp_path: Path) -> None:
    split = write(tmp_path / "a", [[5, 6, 7], [], [8] * 9, [9]])
    # EOS 5 6 7 EOS EOS 8...8 EOS 9 EOS, two bytes a token
    expected = [0, 2, 4, 6, 6, 6, *range(8, 25, 2), 24, 26, 26]
    assert [split.bytes_before(position) for position in range(1, split.tokens + 1)] == expected


def test_counts_are_of_predicted_tokens(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, "train", vocab_size=10, eos_id=EOS) as split:
        split.add(np.array([3, 3, 4]), 3)
        assert split.close()["max_id"] == 4
        assert split.counts.tolist() == [0, 1, 0, 2, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("vocab_size", "name"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_vocabulary_decides_on_the_dtype(tmp_path: Path, vocab_size: int, name: str) -> None:
    split = write(tmp_path / "a", [[vocab_size - 1]], vocab_size=vocab_size)
    assert split.dtype.name == name
    assert split.read(1, 2).tolist() == [vocab_size - 1]


@pytest.mark.parametrize("id", [-1, 300, 70_000])
def test_an_id_outside_the_vocabulary_is_never_written(tmp_path: Path, id: int) -> None:
    with SplitWriter(tmp_path, "train", vocab_size=300, eos_id=EOS) as split:
        split.add(np.array([5, id]), 2)
        with pytest.raises(ValueError, match=f"id {id} is outside the vocabulary of 300"):
            split.close()


def test_a_split_travels_to_another_process_without_its_maps(tmp_path: Path) -> None:
    split = write(tmp_path / "a", [[5] * 10_000])
    split.read(0, 10)
    assert len(split.document_starts) == 2
    raw = pickle.dumps(split)
    assert len(raw) < 2000
    assert pickle.loads(raw).read(0, 3).tolist() == [EOS, 5, 5]


def damage(folder: Path, change) -> str:
    change(folder)
    with pytest.raises(ConfigError) as error:
        read_manifest(folder, "data.path=it")
    return str(error.value)


def edit(**changes):
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not one of this project's"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "not one of this project's"),
        (edit(format_version=1), "has format 1, this version reads 2; prepare it again"),
        (edit(format_version=99), "has format 99, this version reads 2; prepare it again"),
        (edit(splits={"train": {}}), "has a damaged manifest.json"),
        (edit(source={}), "it lacks data, tokenizer"),
        (edit(token_dtype="uint32"), "the counts of train are not those of its files"),
        (lambda folder: (folder / "train-00001.bin").unlink(), "lacks train-00001.bin"),
        (lambda folder: (folder / "train-00000.bin").write_bytes(b"xx"), "train-00000.bin has 2 bytes instead of 2,000"),
        (lambda folder: (folder / "train-starts.bin").write_bytes(b""), "train-starts.bin has 0 bytes instead of 16"),
        (lambda folder: (folder / "train-ids.bin").write_bytes(b""), "train-ids.bin has 0 bytes instead of 16"),
    ],
)
def test_what_was_damaged_is_refused(tmp_path: Path, change, message: str) -> None:
    write(tmp_path / "a", [[5] * 1500])
    found = damage(tmp_path / "a", change)
    assert "data.path=it" in found
    assert message in found


def test_the_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    def fingerprint(name: str, documents: list[list[int]]) -> str:
        write(tmp_path / name, documents)
        return content_fingerprint(read_manifest(tmp_path / name, "it"))

    assert fingerprint("a", [[5, 6]]) == fingerprint("b", [[5, 6]])
    assert fingerprint("a", [[5, 6]]) != fingerprint("c", [[6, 5]])
    # The same ids of another tokenizer are another text.
    manifest = read_manifest(tmp_path / "a", "it")
    other = manifest | {"tokenizer": manifest["tokenizer"] | {"hash": "other"}}
    assert content_fingerprint(other) != content_fingerprint(manifest)


def flip(path: Path, seconds_later: float) -> None:
    """Change one byte of a file, and date it so long after the manifest."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    written = (path.parent / "manifest.json").stat().st_mtime_ns + int(seconds_later * 1e9)
    os.utime(path, ns=(written, written))


@pytest.mark.parametrize("name", ["train-00001.bin", "train-starts.bin", "train-bytes.bin", "train-ids.bin"])
def test_a_file_changed_after_it_was_prepared_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a", [[5] * 1500])
    rule = f"has {name}, which was changed after it was prepared; copy it again or prepare it again"
    flip(tmp_path / "a" / name, 60)
    assert rule in damage(tmp_path / "a", lambda folder: None)
    # What hides behind an old date is found by reading everything.
    flip(tmp_path / "a" / name, 60)
    flip(tmp_path / "a" / name, 0)
    read_manifest(tmp_path / "a", "it")
    assert list(verify_shards(tmp_path / "a", "it")) == [("it", rule)]


def test_a_copy_is_newer_than_its_manifest_and_fine(tmp_path: Path) -> None:
    write(tmp_path / "a", [[5] * 1500])
    for number, path in enumerate(sorted((tmp_path / "a").iterdir())):
        later = path.stat().st_mtime + 100 * number
        os.utime(path, (later, later))
    assert read_manifest(tmp_path / "a", "it")["splits"]["train"]["documents"] == 1
    assert list(verify_shards(tmp_path / "a")) == []


def test_verifying_names_every_file_that_is_wrong(tmp_path: Path) -> None:
    write(tmp_path / "a", [[5] * 1500])
    (tmp_path / "a" / "train-bytes.bin").unlink()
    flip(tmp_path / "a" / "train-00000.bin", 0)
    found = list(verify_shards(tmp_path / "a", "it"))
    assert [rule.split(",")[0] for _, rule in found] == ["has train-00000.bin", "lacks train-bytes.bin"]
    with pytest.raises(ConfigError, match=r"holds no manifest\.json"):
        list(verify_shards(tmp_path))


def test_a_long_check_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LONG_BYTES", 100)
    write(tmp_path / "a", [[5] * 1500])
    said: list[str] = []
    read_manifest(tmp_path / "a", "it", said.append)
    assert said == []
    os.utime(tmp_path / "a" / "manifest.json", (0, 0))
    read_manifest(tmp_path / "a", "it", said.append)
    assert said == [f"Checking 0.0 GB in {tmp_path / 'a'} that are newer than their manifest, as after a copy"]


def test_a_document_of_unknown_origin_has_its_number_for_a_name(tmp_path: Path) -> None:
    assert write(tmp_path / "a", [[5], [6]]).document_name(1) == "document 1"
