"""`llama-lab data inspect`: what it says of every kind of folder, and of what is none."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_lab.cli import main
from llama_lab.config.schema import BpeConfig, FileTokenizerConfig, ShardsConfig, TextConfig, Window
from llama_lab.data import survey as surveying
from llama_lab.data.entries import entries
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.data.survey import length_bins, survey
from llama_lab.data.tokenizer import Tokenizer, train_bpe

WORDS = ["the", "river", "runs", "by", "old", "mill", "and", "a", "miller", "who", "weighs", "grain"]
Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedData:
    """Forty documents of 3 to 120 words, in the cache."""
    random = np.random.default_rng(0)
    texts = [
        " ".join(random.choice(WORDS, size)) + f" {number}." for number, size in enumerate(np.geomspace(3, 120, 40).astype(int))
    ]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "mill.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = TextConfig(
        path=str(tmp_path / "mill.jsonl"), val_fraction=0.2, max_seq_len=8, tokens_per_update=8, window=Window.contiguous
    )
    return prepare(config, BpeConfig(vocab_size=300), lambda sentence: None)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Two .npy files and a tokenizer outside of them."""
    tokenizer = train_bpe([" ".join(WORDS)] * 9, 290)
    tokenizer.save(tmp_path / "own.json")
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("a_1", "a_2"):
        ids = [id for number in range(20) for id in [0, *tokenizer.encode(f"{name} the mill {number}"), 1]]
        np.save(folder / f"{name}.npy", np.array(ids, dtype=np.uint16))
    return folder


def inspect(*words: str | Path) -> int:
    return main(["data", "inspect", *map(str, words)])


def refused(capsys: Output, *words: str | Path) -> str:
    assert inspect(*words) == 2
    shown = capsys.readouterr()
    assert "Splits" not in shown.out
    return shown.err


def test_a_prepared_folder(prepared: PreparedData, capsys: Output, tmp_path: Path) -> None:
    assert inspect(prepared.folder, "--plot", tmp_path / "mill.png") == 0
    shown = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    train, val = prepared.train, prepared.val
    assert val is not None
    assert f"documents {train.documents} {val.documents}" in lines
    assert f"tokens {train.tokens:,} {val.tokens:,}" in lines
    assert f"bytes of text {train.text_bytes:,} {val.text_bytes:,}" in lines
    assert f"bytes a token {train.text_bytes / train.tokens:.3f} {val.text_bytes / val.tokens:.3f}" in lines
    assert {"dtype of ids uint16 uint16", "files 1 1"} <= set(lines)
    assert "Prepared from data=text with the tokenizer asked for as 'bpe 300'" in lines
    assert "kept 40" in lines
    assert "█" in shown
    assert sum(line.startswith("A training document: mill.jsonl:") for line in lines) == 3
    counts = np.bincount(train.read(0, train.tokens))
    top = int(counts.argmax())
    assert any(line.startswith(f"1 {top} ") and line.endswith(f"{100 * counts[top] / train.tokens:.2f} %") for line in lines)
    assert (tmp_path / "mill.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-1] == f"The picture is {tmp_path / 'mill.png'}"
    assert max(map(len, shown.splitlines())) <= max(100, len(str(tmp_path)) + 40)


def test_ticks_have_one_notation(bare: Path, tmp_path: Path) -> None:
    """Also where documents are so equally long that the axis holds no power of ten."""
    assert inspect(bare, "--tokenizer", tmp_path / "own.json", "--plot", tmp_path / "bare.svg") == 0
    labels = re.findall(r"<!-- (.*?) -->", (tmp_path / "bare.svg").read_text(encoding="utf-8"))
    assert {"8", "10", "20"} <= set(labels)
    assert not [label for label in labels if "times" in label or "10^" in label]


def test_an_entry_of_the_cache_goes_by_its_name(prepared: PreparedData, capsys: Output) -> None:
    assert inspect(prepared.folder.name, "--samples", 0) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == str(prepared.folder)
    assert "A training document" not in shown
    assert f"did you mean {prepared.folder.name}?" in refused(capsys, prepared.folder.name[:-1])


def test_a_bare_folder(bare: Path, capsys: Output, tmp_path: Path) -> None:
    assert inspect(bare, "--tokenizer", tmp_path / "own.json", "--verify") == 0
    shown = capsys.readouterr().out
    assert "every id is one of the tokenizer; files of others bring no checksums to compare" in shown
    assert "Files of others, .npy; where documents begin is told by their ids" in shown
    assert "documents      unknown" in shown
    assert "A training document: a_" in shown
    assert "the mill" in shown
    assert "brings no tokenizer.json; name the one its ids were made with: --tokenizer FILE" in refused(capsys, bare)
    (tmp_path / "own.json").rename(bare / "tokenizer.json")
    assert inspect(bare) == 0


def test_ids_of_another_tokenizer_are_noticed(bare: Path, capsys: Output, tmp_path: Path) -> None:
    np.save(bare / "a_3.npy", np.array([5, 40_000], dtype=np.uint16))
    assert inspect(bare, "--tokenizer", tmp_path / "own.json") == 0
    assert "1 ids are beyond the tokenizer's" in capsys.readouterr().out
    assert "holds token id 40000 in a_3.npy" in refused(capsys, bare, "--tokenizer", tmp_path / "own.json", "--verify")


def test_every_file_is_compared_with_its_checksum(prepared: PreparedData, capsys: Output) -> None:
    assert inspect(prepared.folder, "--verify") == 0
    assert f"All files of {prepared.folder} are as they were written" in capsys.readouterr().out
    for name in ("train-00000.bin", "val-bytes.bin"):
        path = prepared.folder / name
        raw = bytearray(path.read_bytes())
        raw[8] ^= 1
        path.write_bytes(raw)
    assert inspect(prepared.folder, "--verify") == 1
    shown = capsys.readouterr()
    assert "has train-00000.bin, which was changed after it was prepared" in shown.err
    assert "has val-bytes.bin, which was changed" in shown.err
    assert len(shown.err.splitlines()) == 2
    assert "All files" not in shown.out


def test_what_is_no_folder_of_tokens(prepared: PreparedData, bare: Path, capsys: Output, tmp_path: Path) -> None:
    assert "nowhere is no folder, and no entry of the cache; llama-lab cache lists what is prepared" in refused(capsys, "nowhere")
    text = tmp_path / "mill.jsonl"
    assert f"is a file; name a folder of tokens, or make one: llama-lab prepare data=text data.path={text}" in refused(capsys, text)
    (tmp_path / "empty").mkdir()
    assert "holds no manifest.json" in refused(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").touch()
    told = f"to use the text in it, type data=text data.path={tmp_path / 'empty'}"
    assert told in refused(capsys, tmp_path / "empty") and "data=text" not in refused(capsys, prepared.folder / "missing")
    (prepared.folder / "manifest.json").unlink()
    said = refused(capsys, prepared.folder)
    assert "holds no manifest.json, so nothing was prepared here to the end" in said and "data=text" not in said
    assert "--plot mill.txt has no ending of a picture; try mill.png" in refused(capsys, bare, "--plot", "mill.txt")
    assert "which is no folder" in refused(capsys, bare, "--plot", tmp_path / "missing" / "a.png")
    assert "'-1' is no number of documents" in refused(capsys, bare, "--samples=-1")


def test_a_tokenizer_is_only_named_for_bare_folders(prepared: PreparedData, capsys: Output, tmp_path: Path) -> None:
    found = refused(capsys, prepared.folder, "--tokenizer", prepared.folder / "tokenizer.json")
    assert "is for bare folders of .npy or .bin files" in found


def test_a_large_set_is_looked_at_in_parts(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr(surveying, "BLOCK_TOKENS", 40)
    monkeypatch.setattr(surveying, "BLOCKS", 3)
    assert inspect(bare, "--tokenizer", tmp_path / "own.json") == 0
    shown = capsys.readouterr().out
    assert "in 120 tokens" in shown
    assert "from a sample of 120 tokens" in shown
    assert "From a sample of " in shown


def test_a_sample_of_documents_is_spread_over_all(prepared: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    known = entries(prepared.tokenizer)
    whole = survey(prepared.train, prepared.tokenizer, known)
    assert whole.lengths.tolist() == sorted(np.diff(prepared.train.document_starts) - 1)
    assert not whole.is_sample_of_documents
    monkeypatch.setattr(surveying, "DOCUMENTS", 8)
    monkeypatch.setattr(surveying, "DOCUMENT_BLOCK", 2)
    part = survey(prepared.train, prepared.tokenizer, known)
    assert part.is_sample_of_documents
    assert len(part.lengths) == 8
    assert part.lengths[0] < whole.lengths.mean() < part.lengths[-1]


def test_a_vocabulary_as_large_as_its_ids_allow_is_counted(tmp_path: Path, prepared: PreparedData) -> None:
    content = json.loads((prepared.folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"filler {number}": number for number in range(len(vocabulary), 65_536)}
    tokenizer = Tokenizer(json.dumps(content))
    assert tokenizer.vocab_size == 65_536
    ids = np.array([65_535, 7, 65_535, 0], dtype=np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    split = replace(
        prepared.train, tokens=4, folder=tmp_path, files=("ids.bin",), starts=(0,), dtype=ids.dtype, starts_file=None, documents=0
    )
    found = survey(split, tokenizer, entries(tokenizer))
    assert (found.tokens, found.beyond) == (4, 0)
    assert {id: found.counts[id] for id in np.flatnonzero(found.counts)} == {0: 1, 7: 1, 65_535: 2}


def test_bins_are_powers_of_two() -> None:
    assert length_bins(np.array([], dtype=np.int64)) == []
    assert length_bins(np.array([4, 7, 8, 40])) == [(4, 7, 2), (8, 15, 1), (16, 31, 0), (32, 63, 1)]
    assert length_bins(np.array([1])) == [(1, 1, 1)]


def test_a_run_is_inspected_by_its_data(llama_lab, bare: Path, outputs: Path, tmp_path: Path) -> None:
    """Training on bare files, through the command line, and then a look at what it was fed."""
    # fmt: off
    words = [
        "experiment=smoke", "hardware=cpu", "wandb=null", "eval=null", "sample=null",
        "data=shards", f"data.path={bare}", "tokenizer=file", f"tokenizer.path={tmp_path / 'own.json'}",
        "data.max_seq_len=16", "data.tokens_per_update=64", "training_tokens=512",
    ]
    # fmt: on
    refused = llama_lab("train", *[word for word in words if word != "eval=null"])
    assert "eval has nothing to validate on: the data holds no validation tokens; eval=null trains without" in refused.stderr
    done = llama_lab("train", *words)
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in outputs.glob("*/*/summary.json"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["update"] == 8
    shown = llama_lab("data", "inspect", str(folder))
    assert shown.returncode == 0, shown.stderr
    assert f"Data of the run {folder}" in shown.stdout
    assert "have changed since" not in shown.stdout
    np.save(bare / "a_3.npy", np.array([5, 1], dtype=np.uint16))
    assert "It is not what the run was trained on" in llama_lab("data", "inspect", str(folder)).stdout
    study = llama_lab("data", "inspect", str(folder.parent))
    assert f"holds runs; name one of them, such as {folder}" in study.stderr


def test_mixtures_and_prepared_folders_take_bare_ones(bare: Path, tmp_path: Path, capsys: Output) -> None:
    """What was imported is inspected like any other folder."""
    config = ShardsConfig(path=str(bare), max_seq_len=8, tokens_per_update=8, window=Window.contiguous, val_fraction=0.2)
    out = tmp_path / "new"
    prepare(config, FileTokenizerConfig(path=str(tmp_path / "own.json")), lambda sentence: None, out=out)
    assert inspect(out) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "kept 40" in shown
    assert "start tokens 40" in shown
