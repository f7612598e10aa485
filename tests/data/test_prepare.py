"""Preparing: once for everyone, from the training side only, found again, and refused where it does not fit."""

import json
import random
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import (
    BpeConfig,
    BytesConfig,
    DocsConfig,
    FileTokenizerConfig,
    ShardsConfig,
    TextConfig,
    TokenizerConfig,
)
from llama_lab.data.cache import prepared_root
from llama_lab.data.prepare import PreparedData, open_prepared, prepare
from llama_lab.data.tokenizer import BytesTokenizer

ROOT = Path(__file__).parents[2]
WORDS = [
    "the",
    "of",
    "a",
    "model",
    "token",
    "learns",
    "reads",
    "writes",
    "quickly",
    "slowly",
    "and",
    "then",
    "because",
    "river",
    "mountain",
    "paper",
    "window",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Thirty documents of invented sentences."""
    chance = random.Random(0)
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(chance.choices(WORDS, k=chance.randint(20, 200))) + ". Größe"}) for _ in range(30)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def config(path: Path, val_fraction: float = 0.2) -> TextConfig:
    return TextConfig(path=str(path), val_fraction=val_fraction)


def decoded(data: PreparedData, split: str) -> list[str]:
    """The documents of a split, by its table."""
    chosen = data.train if split == "train" else data.val
    assert chosen is not None
    starts = chosen.document_starts
    for start in starts:
        assert chosen.read(start, start + 1).tolist() == [data.tokenizer.eos_id]
    return [data.tokenizer.decode(chosen.read(start + 1, end)) for start, end in pairwise(starts)]


@pytest.mark.parametrize("tokenizer", [BpeConfig(vocab_size=300), BytesConfig()])
def test_the_shards_hold_the_documents(text: Path, tokenizer: TokenizerConfig) -> None:
    data = prepare(config(text), tokenizer)
    assert data.val is not None
    originals = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    assert sorted(decoded(data, "train") + decoded(data, "val")) == sorted(originals)
    assert data.train.text_bytes + data.val.text_bytes == sum(len(original.encode()) for original in originals)
    assert data.train.documents + data.val.documents == 30
    assert data.train.dtype == np.uint16


def test_the_last_tenth_of_one_file_is_the_validation_text(tmp_path: Path) -> None:
    raw = "".join(random.Random(0).choices("abc \n", k=100_003))
    (tmp_path / "one.txt").write_text(raw, newline="")
    data = prepare(config(tmp_path / "one.txt", 0.1), BytesConfig())
    assert decoded(data, "val") == [raw[int(100_003 * 0.9) :]]
    assert decoded(data, "train") == [raw[: int(100_003 * 0.9)]]


def test_the_tokenizer_never_saw_validation_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three " * 100 + "zyzzyva " * 100)
    data = prepare(config(tmp_path / "a.txt", 0.4), BpeConfig(vocab_size=400))
    assert len(data.tokenizer.encode(" zyzzyva")) > len(data.tokenizer.encode(" three"))
    assert len(data.tokenizer.encode(" zyzzyva")) >= 7


def test_baselines_are_those_of_the_validation_text(text: Path) -> None:
    data = prepare(config(text), BytesConfig())
    assert data.val is not None
    counts = np.bincount(data.train.read(1, data.train.tokens), minlength=257) + 1
    losses = -np.log2(counts / counts.sum())[data.val.read(1, data.val.tokens)]
    assert data.baselines["unigram_bits_per_byte"] == pytest.approx(losses.sum() / data.val.text_bytes)
    assert 0.5 < data.baselines["xz_bits_per_byte"] < data.baselines["gzip_bits_per_byte"] * 1.2 < 8


def test_a_second_call_finds_the_first_and_says_nothing(text: Path) -> None:
    said: list[str] = []
    first = prepare(config(text), BpeConfig(vocab_size=300), said.append)
    assert len(said) == 3
    manifest = first.folder / "manifest.json"
    written = manifest.stat().st_mtime_ns
    again = prepare(config(text), BpeConfig(vocab_size=300), said.append)
    assert (again.folder, again.fingerprint, len(said)) == (first.folder, first.fingerprint, 3)
    assert manifest.stat().st_mtime_ns == written
    # The same text in another place is the same data.
    copy = text.with_name("elsewhere.jsonl")
    copy.write_bytes(text.read_bytes())
    assert prepare(config(copy), BpeConfig(vocab_size=300), said.append).folder == first.folder


def test_anything_that_changes_the_tokens_is_another_entry(text: Path, tmp_path: Path) -> None:
    BytesTokenizer().save(tmp_path / "tokenizer.json")
    found = [
        prepare(config(text), BpeConfig(vocab_size=300)),
        prepare(config(text), BpeConfig(vocab_size=301)),
        prepare(config(text), BytesConfig()),
        prepare(config(text, 0.5), BytesConfig()),
    ]
    text.write_text(text.read_text(encoding="utf-8").replace("river", "lake"), encoding="utf-8")
    found.append(prepare(config(text), BytesConfig()))
    assert len({data.folder for data in found}) == len({data.fingerprint for data in found}) == 5
    from_file = prepare(config(text), FileTokenizerConfig(path=str(tmp_path / "tokenizer.json")))
    assert from_file.fingerprint == found[-1].fingerprint


def test_preparing_again_gives_the_same_bytes(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config(text), BpeConfig(vocab_size=300)).folder
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "second"))
    second = prepare(config(text), BpeConfig(vocab_size=300)).folder
    assert first != second
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_processes_that_start_together_prepare_once(text: Path) -> None:
    program = (
        "from llama_lab.config.schema import BpeConfig, TextConfig\n"
        "from llama_lab.data.prepare import prepare\n"
        f"print(prepare(TextConfig(path={str(text)!r}, val_fraction=0.2), BpeConfig(vocab_size=300)).fingerprint)\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    workers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [worker.communicate(timeout=170)[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sum(line.startswith("Trained") for lines in outputs for line in lines) == 1
    assert len({lines[-1] for lines in outputs}) == 1
    assert len([path for path in prepared_root().iterdir() if path.is_dir()]) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_preparation_leaves_nothing_that_counts(text: Path) -> None:
    program = (
        "import os, signal\n"
        "from llama_lab.config.schema import BpeConfig, TextConfig\n"
        "from llama_lab.data.prepare import prepare\n"
        "def say(sentence):\n"
        "    if sentence.startswith('Encoded'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare(TextConfig(path={str(text)!r}, val_fraction=0.2), BpeConfig(vocab_size=300), say)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], timeout=170, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    (draft,) = (path for path in prepared_root().iterdir() if path.is_dir())
    assert draft.name.startswith(".text-bpe300-")
    data = prepare(config(text), BpeConfig(vocab_size=300))
    assert [path for path in prepared_root().iterdir() if path.is_dir()] == [data.folder]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_ends_in_one_sentence_and_the_next_command_goes_on(text: Path) -> None:
    program = (
        "import resource, signal\n"
        "from llama_lab.config.errors import ConfigError\n"
        "from llama_lab.config.schema import BytesConfig, TextConfig\n"
        "from llama_lab.data.prepare import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))\n"
        "try:\n"
        f"    prepare(TextConfig(path={str(text)!r}, val_fraction=0.2), BytesConfig())\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], timeout=170, cwd=ROOT, capture_output=True, text=True)
    limit = "lift the limit on the size of a file (ulimit -f shows it) and type the same command again, which goes on from there"
    assert f"cannot be written: File too large; {limit}, or set LLAMA_LAB_CACHE to a folder with room" in result.stdout
    assert result.stderr == ""
    (draft,) = (path for path in prepared_root().iterdir() if path.is_dir())
    assert draft.name.startswith(".text-bytes-")
    data = prepare(config(text), BytesConfig())
    assert [path for path in prepared_root().iterdir() if path.is_dir()] == [data.folder]


def test_a_cache_that_cannot_be_written_names_the_variable(text: Path, cache_folder: Path) -> None:
    cache_folder.write_text("a file where the folder should be")
    with pytest.raises(
        ConfigError, match=r"The cache .*cache cannot be written: .*; move the file that is in its place, or set LLAMA_LAB_CACHE"
    ):
        prepare(config(text), BytesConfig())


def test_a_damaged_entry_says_how_to_remove_it(text: Path) -> None:
    folder = prepare(config(text), BytesConfig()).folder
    (folder / "val-00000.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"llama-lab cache clean {folder.name} removes it"):
        prepare(config(text), BytesConfig())


def test_text_that_changes_meanwhile_is_not_cached(text: Path) -> None:
    def change(sentence: str) -> None:
        if sentence.startswith("Encoded"):
            text.write_text(text.read_text(encoding="utf-8").replace("river", "stream"), encoding="utf-8")

    with pytest.raises(ConfigError, match="changed while it was being read"):
        prepare(config(text), BytesConfig(), change)
    assert not [path for path in prepared_root().iterdir() if path.is_dir()]


@pytest.fixture
def folder(text: Path, tmp_path: Path) -> Path:
    """A prepared set that was moved out of the cache."""
    return prepare(config(text), BpeConfig(vocab_size=300)).folder.rename(tmp_path / "moved")


def refusal(folder: Path, tokenizer: TokenizerConfig) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(ShardsConfig(path=str(folder)), tokenizer)
    return str(error.value)


def test_a_cache_entry_is_a_folder_of_shards(folder: Path) -> None:
    data = prepare(ShardsConfig(path=str(folder)), BpeConfig(vocab_size=300))
    assert data.folder == folder
    assert data.fingerprint == open_prepared(folder).fingerprint
    same = prepare(ShardsConfig(path=str(folder)), FileTokenizerConfig(path=str(folder / "tokenizer.json")))
    assert same.fingerprint == data.fingerprint
    assert not prepared_root().joinpath("moved").exists()


def test_shards_go_with_the_tokenizer_they_were_made_with(folder: Path, tmp_path: Path) -> None:
    hint = f"use tokenizer.vocab_size=300 or tokenizer=file tokenizer.path={folder / 'tokenizer.json'}"
    assert f"tokenizer.vocab_size=2048 is not the tokenizer that {folder} was made with, which has 300 entries; {hint}" in refusal(
        folder, BpeConfig(vocab_size=2048)
    )
    assert "tokenizer=bytes is not the tokenizer" in refusal(folder, BytesConfig())
    BytesTokenizer().save(tmp_path / "bytes.json")
    assert "bytes.json is not the tokenizer" in refusal(folder, FileTokenizerConfig(path=str(tmp_path / "bytes.json")))


def test_a_vocabulary_that_stayed_below_what_was_asked_for_is_found_by_either_number(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab ab ab cd " * 5)
    made = prepare(config(tmp_path / "a.txt"), BpeConfig(vocab_size=5000))
    assert made.tokenizer.vocab_size < 300
    for vocab_size in (5000, made.tokenizer.vocab_size):
        assert prepare(ShardsConfig(path=str(made.folder)), BpeConfig(vocab_size=vocab_size)).fingerprint == made.fingerprint


def test_nothing_is_held_out_afterwards(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.val_fraction=0\.1 holds out nothing from what is prepared already; leave it out"):
        prepare(ShardsConfig(path=str(folder), val_fraction=0.1), BpeConfig(vocab_size=300))


def test_bytes_shards_ask_for_bytes(text: Path) -> None:
    made = prepare(config(text), BytesConfig())
    assert refusal(made.folder, BpeConfig(vocab_size=257)).endswith("which has 257 entries; use tokenizer=bytes")
    assert prepare(ShardsConfig(path=str(made.folder)), BytesConfig()).fingerprint == made.fingerprint


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_ids_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["splits"]["val"].update(max_id=300))
    assert "holds token id 300, but its tokenizer has 300 entries" in refusal(folder, BpeConfig(vocab_size=300))


def test_an_exchanged_tokenizer_is_refused(folder: Path) -> None:
    BytesTokenizer().save(folder / "tokenizer.json")
    assert "has a tokenizer.json that is not the one its shards were made with" in refusal(folder, BpeConfig(vocab_size=300))


def test_shards_may_lack_a_validation_side(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["splits"].pop("val"))
    assert prepare(ShardsConfig(path=str(folder)), BpeConfig(vocab_size=300)).val is None


def test_a_folder_that_was_not_prepared_is_named(tmp_path: Path) -> None:
    assert f"data.path={tmp_path} holds no manifest.json" in refusal(tmp_path, BytesConfig())
    assert "is no folder" in refusal(tmp_path / "missing", BytesConfig())


def test_the_documentation_becomes_tokens() -> None:
    data = prepare(DocsConfig(packages=[], val_bytes=150_000), BpeConfig(vocab_size=1024))
    assert data.val is not None
    assert data.tokenizer.vocab_size == 1024
    assert data.train.text_bytes / data.train.tokens > 2.3
    assert data.baselines["xz_bits_per_byte"] < data.baselines["gzip_bits_per_byte"] < data.baselines["unigram_bits_per_byte"] < 4
