"""Documents out of the token files of others: the same as if their text had been prepared here."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import FileTokenizerConfig, ShardsConfig, Window
from llama_lab.data import importing
from llama_lab.data.entries import entries
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.data.shards import read_manifest
from llama_lab.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

TEXTS = [f"The {word} runs by the mill;\nGrüße {number} times." for number in range(8) for word in ("river", "miller", "weir")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "tokens"
    found.mkdir()
    return found


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    train_bpe(TEXTS, 300).save(tmp_path / "own.json")
    return load_tokenizer(tmp_path / "own.json")


def config(folder: Path, **values) -> ShardsConfig:
    return ShardsConfig(path=str(folder), max_seq_len=8, tokens_per_update=8, **{"window": Window.contiguous, **values})


def bring_in(folder: Path, **values) -> PreparedData:
    out = folder.with_name("new")
    return prepare(config(folder, **values), FileTokenizerConfig(path=str(folder.with_name("own.json"))), print, out=out)


def refusal(folder: Path, **values) -> str:
    with pytest.raises(ConfigError) as error:
        bring_in(folder, **values)
    return str(error.value)


def documents(data: PreparedData, side: str = "train") -> list[tuple[str, list[int], int]]:
    """(name, ids, bytes of text) of each."""
    split = data.train if side == "train" else data.val
    assert split is not None
    found = []
    for number in range(split.documents):
        start, end = (int(position) for position in split.document_starts[number : number + 2])
        size = split.bytes_before(end) - split.bytes_before(start + 1)
        found.append((split.document_name(number), split.read(start + 1, end).tolist(), size))
    return found


def counts(data: PreparedData) -> dict[str, int]:
    return read_manifest(data.folder, "it")["source"]["counts"]


def around(before: list[int], after: list[int], between: list[int]) -> Callable[[list[list[int]]], list[int]]:
    """Documents between tokens, with more between two of them."""

    def join(parts: list[list[int]]) -> list[int]:
        joined: list[int] = []
        for part in parts:
            joined += [*(between if joined else []), *before, *part, *after]
        return joined

    return join


# <SOS> is 0 and <EOS> is 1; a line break lies between documents of SimpleLLaMA.
WAYS = {
    "nanoGPT": (around([], [1], []), {"start_tokens": 0, "blanks_between": 0}),
    "llm.c": (around([1], [], []), {"start_tokens": 0, "blanks_between": 0}),
    "llm.c for Llama 3": (around([0], [], []), {"start_tokens": 24, "blanks_between": 0}),
    "SimpleLLaMA": (around([0], [1], [-1]), {"start_tokens": 24, "blanks_between": 22}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", [3, 2**22])
def test_documents_are_found_whichever_tokens_stand_around_them(
    folder: Path, tokenizer: Tokenizer, way: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "BLOCK_TOKENS", block)
    join, expected = WAYS[way]
    (line_break,) = tokenizer.encode("\n")
    ids = [tokenizer.encode(text) for text in TEXTS]
    for name, part in (("part_9.npy", ids[:10]), ("part_10.npy", ids[10:])):
        found = np.array(join(part))
        np.save(folder / name, np.where(found == -1, line_break, found).astype(np.uint16))
    data = bring_in(folder)
    names = [f"part_9.npy:{number}" for number in range(1, 11)] + [f"part_10.npy:{number}" for number in range(1, 15)]
    sizes = [len(text.encode()) for text in TEXTS]
    assert documents(data) == list(zip(names, ids, sizes, strict=True))
    assert (data.val, data.baselines) == (None, {})
    assert counts(data) == {"kept": 24, "empty": 0, **expected}
    assert sorted(path.name for path in data.folder.glob("*.bin")) == [
        "train-00000.bin", "train-bytes.bin", "train-ids.bin", "train-starts.bin"
    ]  # fmt: skip


def test_a_document_goes_on_in_the_next_file(folder: Path, tokenizer: Tokenizer) -> None:
    np.save(folder / "a.npy", np.array([9, 10, 1, 11, 12], dtype=np.uint16))
    np.save(folder / "b.npy", np.array([13, 1, 14], dtype=np.uint16))
    found = documents(bring_in(folder))
    assert [(name, ids) for name, ids, _ in found] == [("a.npy:1", [9, 10]), ("a.npy:2", [11, 12, 13]), ("b.npy:1", [14])]


def test_documents_without_text_are_counted_and_left_out(folder: Path, tokenizer: Tokenizer) -> None:
    (space,) = tokenizer.encode(" ")
    np.save(folder / "a.npy", np.array([1, 9, 1, 1, space, 1, 0, 1, 10, 1], dtype=np.uint16))
    data = bring_in(folder)
    assert [ids for _, ids, _ in documents(data)] == [[9], [10]]
    assert counts(data) == {"kept": 2, "empty": 3, "start_tokens": 1, "blanks_between": 0}


def test_validation_is_that_of_the_files(folder: Path, tokenizer: Tokenizer) -> None:
    join = WAYS["nanoGPT"][0]
    ids = [tokenizer.encode(text) for text in TEXTS]
    np.array(join(ids[:20]), dtype="<u2").tofile(folder / "train.bin")
    np.array(join(ids[20:]), dtype="<u2").tofile(folder / "val.bin")
    data = bring_in(folder)
    assert [ids for _, ids, _ in documents(data, "val")] == ids[20:]
    assert [name for name, *_ in documents(data, "val")] == [f"val.bin:{number}" for number in range(1, 5)]
    assert data.baselines["xz_bits_per_byte"] > 0
    assert data.baselines["unigram_bits_per_byte"] > 0
    assert "asks for a second validation split; val.bin is one" in refusal(folder, val_fraction=0.1)


def test_a_share_is_held_out_and_equal_documents_stay_together(folder: Path, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(f"{text} {number}") for number in range(10) for text in TEXTS]
    np.save(folder / "a.npy", np.array(WAYS["SimpleLLaMA"][0](ids + ids), dtype=np.int64).clip(0).astype(np.uint16))
    data = bring_in(folder, val_fraction=0.25)
    train, val = ({tuple(ids) for _, ids, _ in documents(data, side)} for side in ("train", "val"))
    assert not train & val
    assert 40 < len(val) < 80
    assert len(train) + len(val) == 240
    assert data.val is not None
    assert data.val.documents == 2 * len(val)


def test_what_cannot_be_divided_is_refused(folder: Path, tokenizer: Tokenizer) -> None:
    np.save(folder / "a.npy", np.array(tokenizer.encode(TEXTS[0]), dtype=np.uint16))
    assert "holds nothing between documents: <EOS> (id 1) and <SOS> (id 0) never occur" in refusal(folder)
    np.save(folder / "a.npy", np.array([9, 10, 1, 11, 1], dtype=np.uint16))
    assert "holds out none of the 2 documents" in refusal(folder, val_fraction=1e-9)
    assert "leaves nothing to train on: all of its 2 documents are held out" in refusal(folder, val_fraction=0.999999999)
    assert not list(folder.parent.glob(".new.p*")), "what nobody can go on from is removed"


def test_a_file_that_changes_meanwhile_is_noticed(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    np.save(folder / "a.npy", np.array([9, 10, 1, 11, 1], dtype=np.uint16))

    def change(sentence: str) -> None:
        if sentence.startswith("Wrote"):
            os.utime(folder / "a.npy", (1, 1))

    with pytest.raises(ConfigError, match=r"a\.npy changed while it was being read"):
        prepare(config(folder), FileTokenizerConfig(path=str(tmp_path / "own.json")), change, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_same_call_finds_it_done(folder: Path, tokenizer: Tokenizer) -> None:
    np.save(folder / "a.npy", np.array([9, 10, 1, 11, 1], dtype=np.uint16))
    first = bring_in(folder)
    manifest = (first.folder / "manifest.json").stat().st_mtime_ns
    assert bring_in(folder).fingerprint == first.fingerprint
    assert (first.folder / "manifest.json").stat().st_mtime_ns == manifest
    assert "is prepared already" in refusal(first.folder.rename(folder.with_name("older")))


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_and_called_again_ends_with_the_same_bytes(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = [tokenizer.encode(f"{text} {number}") for number in range(200) for text in TEXTS]
    np.save(folder / "a.npy", np.array(WAYS["nanoGPT"][0](ids), dtype=np.uint16))
    whole = bring_in(folder, val_fraction=0.1)
    expected = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    whole.folder.rename(tmp_path / "unbroken")
    program = f"""
import os, signal
from pathlib import Path
from llama_lab.config.schema import FileTokenizerConfig, ShardsConfig, Window
from llama_lab.data import importing
from llama_lab.data.draft import FolderWriter
from llama_lab.data.prepare import prepare
importing.SAVE_SECONDS = 0
save = FolderWriter.save
def save_and_die(writer):
    save(writer)
    if writer.documents > 1000:
        os.kill(os.getpid(), signal.SIGKILL)
FolderWriter.save = save_and_die
data = ShardsConfig(path={str(folder)!r}, max_seq_len=8, tokens_per_update=8, window=Window.contiguous, val_fraction=0.1)
prepare(data, FileTokenizerConfig(path={str(tmp_path / "own.json")!r}), print, out=Path({str(tmp_path / "new")!r}))
"""
    killed = subprocess.run([sys.executable, "-c", program], timeout=170, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "new").exists()
    said: list[str] = []
    prepare(
        config(folder, val_fraction=0.1), FileTokenizerConfig(path=str(tmp_path / "own.json")), said.append, out=tmp_path / "new"
    )
    assert any(sentence.startswith("Going on where an earlier command stopped") for sentence in said)
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == expected


def library(tmp_path: Path, kind: str) -> Iterator[tuple[Tokenizer, Library]]:
    backend = Library(models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace"))
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = []
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.save(str(tmp_path / "library.json"))
    yield load_tokenizer(tmp_path / "library.json"), backend


@pytest.mark.parametrize("kind", ["plain", "prefix", "metaspace"])
def test_entries_know_their_bytes(tmp_path: Path, kind: str) -> None:
    ((tokenizer, backend),) = library(tmp_path, kind)
    known = entries(tokenizer)
    assert known.start_ids == (backend.token_to_id("<s>"),)
    assert (known.is_exact, known.adds_space) == (kind != "metaspace", kind != "plain")
    assert known.shown(tokenizer.eos_id) == "</s>"
    for text in TEXTS:
        raw = b"".join(known.text[id] for id in backend.encode(text, add_special_tokens=False).ids)
        assert raw == b" " * known.adds_space + text.encode()


def test_a_space_that_the_tokenizer_added_is_no_text(folder: Path, tmp_path: Path) -> None:
    ((_, backend),) = library(tmp_path, "prefix")
    (tmp_path / "library.json").rename(tmp_path / "own.json")
    ids = [backend.encode(text, add_special_tokens=False).ids for text in TEXTS]
    np.save(folder / "a.npy", np.array(around([], [2], [])(ids), dtype=np.uint16))
    assert [size for *_, size in documents(bring_in(folder))] == [len(text.encode()) for text in TEXTS]


def test_a_byte_that_is_no_text_is_shown_as_one(tmp_path: Path) -> None:
    train_bpe(TEXTS, 261).save(tmp_path / "own.json")
    content = json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))
    known = entries(load_tokenizer(tmp_path / "own.json"))
    assert known.shown(content["model"]["vocab"]["Ã"]) == "0xC3"
    assert known.shown(content["model"]["vocab"]["Ġ"]) == "' '"
    assert known.shown(0) == "<SOS>"
