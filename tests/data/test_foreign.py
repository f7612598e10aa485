"""Folders of token files that others wrote: every id in its place, and what is not whole refused by name."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import BpeConfig, BytesConfig, FileTokenizerConfig, ShardsConfig, TokenizerConfig, Window
from llama_lab.data import cache, id_check
from llama_lab.data.foreign import Kind, find_tokens, natural_order
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.data.stream import TokenStream
from llama_lab.data.tokenizer import BytesTokenizer, train_bpe

TEXTS = ["the river runs by the mill and the miller runs by the river", "a mill by the river"] * 5
Write = Callable[[Path, "list[int] | np.ndarray"], None]


def npy(path: Path, ids: "list[int] | np.ndarray") -> None:
    np.save(path, np.asarray(ids, dtype=np.uint16))


def llm_c(path: Path, ids: "list[int] | np.ndarray", magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype=dtype).tobytes())


def llama_3(path: Path, ids: "list[int] | np.ndarray") -> None:
    llm_c(path, ids, magic=20240801, version=7, dtype="<u4")


def nano_gpt(path: Path, ids: "list[int] | np.ndarray") -> None:
    path.write_bytes(np.asarray(ids, dtype="<u2").tobytes())


KINDS = [(npy, ".npy", Kind.npy), (llm_c, ".bin", Kind.llm_c), (llama_3, ".bin", Kind.llm_c), (nano_gpt, ".bin", Kind.nano_gpt)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "tokens"
    found.mkdir()
    return found


@pytest.fixture
def tokenizer(tmp_path: Path) -> FileTokenizerConfig:
    """Of 300 entries at most, in a file outside the folder."""
    train_bpe(TEXTS, 280).save(tmp_path / "own.json")
    return FileTokenizerConfig(path=str(tmp_path / "own.json"))


def config(folder: Path, **values) -> ShardsConfig:
    return ShardsConfig(path=str(folder), max_seq_len=8, tokens_per_update=8, **{"window": Window.contiguous, **values})


def open_folder(folder: Path, tokenizer: TokenizerConfig) -> PreparedData:
    return prepare(config(folder), tokenizer, lambda sentence: None)


def refusal(folder: Path, tokenizer: TokenizerConfig, **values) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(config(folder, **values), tokenizer, lambda sentence: None)
    return str(error.value)


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 280, count)


@pytest.mark.parametrize(("write", "suffix", "kind"), KINDS)
def test_the_stream_is_the_ids_of_the_files_in_order(
    folder: Path, tokenizer: FileTokenizerConfig, write: Write, suffix: str, kind: Kind
) -> None:
    sizes = {"train_2": 100, "train_10": 31, "train_1": 57, "my_val": 40}
    written = {name: numbers(size, seed) for seed, (name, size) in enumerate(sizes.items())}
    for name, ids in written.items():
        write(folder / f"{name}{suffix}", ids)
    (folder / "README.md").write_text("not tokens")
    (folder / "inner").mkdir()
    assert find_tokens(folder, "it").kind is kind
    data = open_folder(folder, tokenizer)
    whole = np.concatenate([written["train_1"], written["train_2"], written["train_10"]])
    assert data.train.tokens == len(whole)
    assert data.train.read(0, len(whole)).tolist() == whole.tolist()
    assert data.val is not None
    assert data.val.read(0, 40).tolist() == written["my_val"].tolist()
    # Windows cross the ends of files, and the last one is padded.
    stream = TokenStream(data.train, max_seq_len=8, window=Window.contiguous, shuffle=False)
    fed = np.concatenate([batch[0].flatten().numpy() for batch in stream.batches(5)])
    assert fed[: len(whole) - 1].tolist() == whole[:-1].tolist()
    assert (stream.predicted_tokens, stream.text_bytes) == (len(whole) - 1, 0)


def test_other_processes_open_what_they_are_handed(folder: Path, tokenizer: FileTokenizerConfig) -> None:
    npy(folder / "a.npy", numbers(50))
    data = open_folder(folder, tokenizer)
    data.train.read(0, 1)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.train.read(0, 50).tolist() == data.train.read(0, 50).tolist()
    assert copy.tokenizer.encode("the <EOS> mill") == data.tokenizer.encode("the <EOS> mill")


def test_names_are_sorted_as_people_count() -> None:
    names = ["b_1.npy", "a_10.npy", "a_9.npy", "a_010.npy", "a.npy", "10.npy", "9.npy"]
    assert sorted(names, key=natural_order) == ["9.npy", "10.npy", "a.npy", "a_9.npy", "a_010.npy", "a_10.npy", "b_1.npy"]


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("val", "val"),
        ("fineweb_val_000000", "val"),
        ("x-validation2", "val"),
        ("Valid", "val"),
        ("medieval_1", "train"),
        ("eval", "train"),
    ],
)
def test_val_is_a_word_of_the_name(folder: Path, name: str, side: str) -> None:
    npy(folder / f"{name}.npy", [1, 2])
    found = find_tokens(folder, "it")
    assert len(found.val if side == "val" else found.train) == 1


def test_ids_beyond_the_vocabulary_are_named_with_their_file(folder: Path, tokenizer: FileTokenizerConfig) -> None:
    npy(folder / "a.npy", numbers(50))
    npy(folder / "b.npy", [5, 50256, 7])
    found = refusal(folder, tokenizer)
    assert f"data.path={folder} holds token id 50256 in b.npy, but the tokenizer has 280 entries" in found


def test_ids_are_read_once(folder: Path, tokenizer: FileTokenizerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LARGE_BYTES", 100)
    monkeypatch.setattr(id_check, "READ_BYTES", 64)
    for name in ("a", "b"):
        npy(folder / f"{name}.npy", numbers(500))
        os.utime(folder / f"{name}.npy", (time.time() - 60, time.time() - 60))
    said: list[str] = []
    first = prepare(config(folder), tokenizer, said.append)
    assert len(said) == 1
    assert said[0].startswith("Checked 0.00 GB of token ids in ")
    assert prepare(config(folder), tokenizer, said.append).fingerprint == first.fingerprint
    assert len(said) == 1
    changed = numbers(500)
    changed[123] = 279
    npy(folder / "b.npy", changed)
    assert prepare(config(folder), tokenizer, said.append).fingerprint != first.fingerprint
    assert len(said) == 2


def test_of_several_processes_one_reads(
    folder: Path, tokenizer: FileTokenizerConfig, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that comes while another one reads waits for it, and then finds what it remembered."""
    monkeypatch.setattr(cache, "LARGE_BYTES", 100)
    npy(folder / "a.npy", numbers(500))
    os.utime(folder / "a.npy", (time.time() - 60, time.time() - 60))
    program = f"""
from llama_lab.config.schema import FileTokenizerConfig, ShardsConfig, Window
from llama_lab.data.prepare import prepare
data = ShardsConfig(path={str(folder)!r}, max_seq_len=8, tokens_per_update=8, window=Window.contiguous)
print("ready", flush=True)
print(prepare(data, FileTokenizerConfig(path={tokenizer.path!r})).train.tokens)
"""
    cache_folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", program]
    with (
        cache.lock_file(cache_folder / "token-files.lock") as held,
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        cache.Remembered("token-files").of(folder / "a.npy", lambda path: [279, "its hash"])
        held.release()
        assert process.communicate(timeout=170)[0] == "500\n", "nothing was left to be checked"


def test_the_fingerprint_is_of_the_tokens_and_not_of_the_place(
    folder: Path, tokenizer: FileTokenizerConfig, tmp_path: Path
) -> None:
    npy(folder / "a_1.npy", numbers(50))
    npy(folder / "a_2.npy", numbers(20))
    before = open_folder(folder, tokenizer).fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert open_folder(moved, tokenizer).fingerprint == before
    (moved / "a_1.npy").rename(moved / "a_3.npy")
    assert open_folder(moved, tokenizer).fingerprint != before


def cut(write: Write, by: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path, list(range(100)))
        path.write_bytes(path.read_bytes()[:-by])

    return make


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.npy", cut(npy, 20), "is cut: its header says 100 ids, 328 bytes in all, and it has 308; copy it again"),
        ("a.npy", lambda path: path.write_bytes(b""), "is not what numpy.save writes"),
        ("a.npy", lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00rubbish"), "has a header that numpy cannot read"),
        ("a.npy", lambda path: np.save(path, np.zeros((2, 3), np.uint16)), "has 2 dimensions (2, 3) instead of one"),
        ("a.npy", lambda path: np.save(path, np.array(5, np.uint16)), "has 0 dimensions () instead of one"),
        ("a.npy", lambda path: np.save(path, np.array([], np.uint16)), "holds no ids; remove it"),
        ("a.npy", lambda path: np.save(path, np.arange(5)), "has dtype int64; save the ids as uint16 or uint32"),
        ("a.npy", lambda path: np.save(path, np.arange(5.0)), "has dtype float64"),
        ("a.npy", lambda path: np.save(path, np.arange(5, dtype=np.uint8)), "has dtype uint8"),
        ("a.npy", lambda path: np.save(path, np.arange(5, dtype=">u2")), "is big-endian"),
        (
            "a.npy",
            lambda path: np.save(path, np.array([print], object), allow_pickle=True),
            "holds Python objects, which are never loaded",
        ),
        ("a.bin", cut(llm_c, 1), "is cut: its header says 100 ids, 1,224 bytes in all, and it has 1,223; copy it again"),
        ("a.bin", cut(llm_c, 300), "has 924; copy it again"),
        ("a.bin", lambda path: path.write_bytes(b""), "is empty; remove it or copy it again"),
        ("a.bin", lambda path: path.write_bytes(b"abc"), "3 bytes are no whole number of uint16 ids"),
        ("a.bin", lambda path: llm_c(path, [1], version=2), "has version 2 of llm.c's header; only 1 is known for 20240520"),
        ("a.bin", lambda path: llm_c(path, [1], magic=20240522), "holds questions for an evaluation by llm.c"),
        ("a.bin", lambda path: path.write_bytes(np.full(256, 20240520, ">i4").tobytes()), "is big-endian"),
        ("a.bin", lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "is a .npy file by its content; rename it"),
    ],
)
def test_what_is_no_whole_file_of_tokens_is_refused_by_name(
    folder: Path, tokenizer: FileTokenizerConfig, name: str, make: Callable[[Path], None], message: str
) -> None:
    make(folder / name)
    found = refusal(folder, tokenizer)
    assert f"data.path={folder}: {name} " in found
    assert message in found


def test_all_damaged_files_are_named_up_to_a_handful(folder: Path, tokenizer: FileTokenizerConfig) -> None:
    for number in range(8):
        (folder / f"{number}.npy").write_bytes(b"")
    found = refusal(folder, tokenizer)
    assert "4.npy is not" in found
    assert "5.npy" not in found
    assert "has 3 more files like these" in found


def test_kinds_are_not_mixed(folder: Path, tokenizer: FileTokenizerConfig) -> None:
    npy(folder / "a.npy", [1])
    nano_gpt(folder / "b.bin", [1])
    assert "mixes .npy (a.npy) and .bin without a header (b.bin); give each kind a folder of its own" in refusal(folder, tokenizer)
    (folder / "a.npy").unlink()
    llm_c(folder / "c.bin", [1])
    assert "mixes .bin without a header (b.bin) and .bin with llm.c's header (c.bin)" in refusal(folder, tokenizer)
    (folder / "b.bin").unlink()
    llama_3(folder / "d.bin", [1])
    assert "mixes uint16 (c.bin) and uint32 (d.bin); write all files with one dtype" in refusal(folder, tokenizer)


def test_what_is_kept_for_a_test_is_not_trained_on(folder: Path, tokenizer: FileTokenizerConfig) -> None:
    npy(folder / "train.npy", [1])
    npy(folder / "my_test_1.npy", [1])
    assert "holds my_test_1.npy, which is kept for a test by its name" in refusal(folder, tokenizer)


def test_a_folder_needs_tokens_to_train_on(folder: Path, tokenizer: FileTokenizerConfig) -> None:
    assert "holds no manifest.json" in refusal(folder, tokenizer)
    npy(folder / "val.npy", [1, 2])
    assert "holds no training tokens: all of its files have val in their names" in refusal(folder, tokenizer)


def test_a_folder_of_ours_without_its_manifest_is_not_taken_for_anothers(folder: Path, tokenizer: FileTokenizerConfig) -> None:
    nano_gpt(folder / "train-00000.bin", [1, 2])
    nano_gpt(folder / "train-starts.bin", [1, 2])
    assert "holds no manifest.json" in refusal(folder, tokenizer)


def test_what_needs_documents_says_how_to_prepare_them(folder: Path, tokenizer: FileTokenizerConfig) -> None:
    npy(folder / "a.npy", [1, 2])
    command = f"llama-lab prepare data=shards data.path={folder} tokenizer=file tokenizer.path={tokenizer.path} --out NEW"
    for window in (Window.document, Window.packed):
        found = refusal(folder, tokenizer, window=window)
        assert f"data.window={window.name} needs to know where documents begin" in found
        assert command in found
    found = refusal(folder, tokenizer, val_fraction=0.1)
    assert "data.val_fraction=0.1 holds out nothing from tokens that are read where they lie" in found
    assert command.replace(" tokenizer=", " data.val_fraction=0.1 tokenizer=") in found


def test_the_tokenizer_is_named_or_lies_beside(folder: Path, tokenizer: FileTokenizerConfig) -> None:
    npy(folder / "a.npy", numbers(50))
    assert "brings no tokenizer.json; name the one its ids were made with: tokenizer=file" in refusal(
        folder, BpeConfig(vocab_size=280)
    )
    train_bpe(TEXTS, 280).save(folder / "tokenizer.json")
    assert open_folder(folder, BpeConfig(vocab_size=280)).fingerprint == open_folder(folder, tokenizer).fingerprint
    beside = f"use tokenizer=file tokenizer.path={folder / 'tokenizer.json'}"
    assert f"tokenizer.vocab_size=4096 is not that of {folder / 'tokenizer.json'}, which has 280; {beside}" in refusal(
        folder, BpeConfig(vocab_size=4096)
    )
    assert f"tokenizer=bytes is another one than {folder / 'tokenizer.json'}; {beside}" in refusal(folder, BytesConfig())


def test_bytes_need_no_file(folder: Path) -> None:
    npy(folder / "a.npy", [*"Grüße".encode(), 256])
    data = open_folder(folder, BytesConfig())
    assert isinstance(data.tokenizer, BytesTokenizer)
    assert data.tokenizer.decode(data.train.read(0, data.train.tokens)) == "Grüße"
