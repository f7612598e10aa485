"""Mixtures: exact shares at every moment, each source in an order of its own, and one tokenizer between them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_lab import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import MixtureConfig, RunConfig, Window
from llama_lab.data.mixture import Exposure, Mixture, exposures
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.data.shards import Split, open_split
from llama_lab.data.stream import MixedStream, TokenStream, batch_hash, source_seeds, training_stream
from llama_lab.data.writer import SplitWriter


def silent(text: str) -> None:
    """Say nothing."""


def random_weights(seed: int) -> list[float]:
    draw = np.random.default_rng(seed)
    return (draw.random(draw.integers(1, 7)) ** 3 + 1e-3).tolist()


@pytest.mark.parametrize("seed", range(12))
def test_each_source_has_its_share_at_every_moment(seed: int) -> None:
    weights = random_weights(seed)
    mixture, count = Mixture(weights), 4000
    shares = np.array(weights) / sum(weights)
    owner = np.empty(count, dtype=np.int64)
    for source, (rows, number) in enumerate(mixture.turns(0, count)):
        assert number == 0
        owner[rows] = source
    given = np.cumsum(owner[:, None] == np.arange(len(weights)), axis=0)
    expected = np.arange(1, count + 1)[:, None] * shares
    assert np.abs(given - expected).max() <= min(len(weights) - 1, 2)
    for moment in (0, 1, 2, 999, 4000):
        assert mixture.given(moment) == [int((owner[:moment] == source).sum()) for source in range(len(weights))]


@pytest.mark.parametrize("seed", range(6))
def test_whose_turn_it_is_needs_no_history(seed: int) -> None:
    mixture = Mixture(random_weights(seed))
    draw = np.random.default_rng(seed)
    for first in [0, *draw.integers(0, 10**12, size=20).tolist(), 2**40]:
        count = int(draw.integers(1, 50))
        turns = mixture.turns(first, count)
        assert sorted(np.concatenate([rows for rows, _ in turns]).tolist()) == list(range(count))
        assert [number for _, number in turns] == mixture.given(first)
        split = int(draw.integers(0, count + 1))
        for (rows, number), (early, _), (late, again) in zip(
            turns, mixture.turns(first, split), mixture.turns(first + split, count - split), strict=True
        ):
            assert rows.tolist() == [*early.tolist(), *(late + split).tolist()]
            assert again == number + len(early)


@pytest.fixture
def write(tmp_path: Path):
    """Writes a split of documents whose ids lie in a range of their own."""

    def build(name: str, lengths: list[int], low: int, high: int) -> Split:
        folder = tmp_path / name
        folder.mkdir()
        draw = np.random.default_rng(0)
        with SplitWriter(folder, "train", vocab_size=60_000, eos_id=1) as writer:
            for length in lengths:
                writer.add(draw.integers(low, high, length), length)
            described = writer.close()
        split = open_split(folder, {"token_dtype": "uint16", "splits": {"train": described}}, "train")
        assert split is not None
        return split

    return build


def test_shares_of_ten_million_tokens_are_within_a_thousandth(write) -> None:
    weights, length = [0.55, 0.3, 0.15], 2048
    splits = [write(f"s{low}", [30_000] * 9, low, low + 10_000) for low in (2, 10_002, 20_002)]
    streams = [TokenStream(split, max_seq_len=length, window=Window.contiguous, seed=seed) for seed, split in enumerate(splits)]
    mixed = MixedStream(streams, weights)
    counts = np.zeros(3)
    for first in range(0, 10_000_000 // length, 64):
        ids = mixed.batch(first, 64).tokens.numpy()
        counts += np.histogram(ids[ids > 1], bins=[2, 10_002, 20_002, 30_002])[0]
    assert np.abs(counts / counts.sum() - weights).max() < 0.001


@pytest.mark.parametrize("window", list(Window))
def test_each_source_goes_through_its_own_epochs(write, window: Window) -> None:
    splits = [write("a", [50, 3, 90, 21, 70], 2, 999), write("b", [9] * 30, 1000, 1999), write("c", [400], 2000, 2999)]
    build = [lambda split=split: TokenStream(split, max_seq_len=8, window=window, seed=split.tokens) for split in splits]
    mixed = MixedStream([make() for make in build], [0.5, 0.3, 0.2])
    count = 500
    everything = mixed.batch(0, count)
    places = mixed.located(0, count)
    for source, alone in enumerate(make() for make in build):
        rows = [row for row, place in enumerate(places) if place.source == source]
        expected = alone.batch(0, len(rows))
        for part, whole in zip(expected, everything, strict=True):
            assert (part is None and whole is None) or torch.equal(part, whole[rows])
        assert [places[row][1:] for row in rows] == [place[1:] for place in alone.located(0, len(rows))]
        assert [places[row].epoch for row in rows] == [number // alone.windows for number in range(len(rows))]
        assert mixed.epochs(count)[source] == len(rows) / alone.windows
    assert mixed.predicted(7, 200) == int((everything.targets[7:207] >= 0).sum())
    hashes = [batch_hash(mixed.batch(first, 10), first, 10) for first in range(0, 50, 10)]
    assert sum(hashes) % 2**64 == batch_hash(everything, 0, 50)


def text(folder: Path, name: str, documents: int) -> Path:
    """A text file of documents that say which they are."""
    path = folder / f"{name}.jsonl"
    lines = [
        json.dumps({"text": f"{name} {number}: " + f"the {number}th of {name}. " * (3 + number % 7)}) for number in range(documents)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def prepared(path: Path, *words: str) -> PreparedData:
    run = compose(["data=text", f"data.path={path}", "tokenizer=bytes", "data.max_seq_len=32", *words])
    return prepare(run.data, run.tokenizer, silent)


def mixture_of(folders: list[Path], weights: list[float], *words: str) -> RunConfig:
    given = [f"data.paths=[{','.join(map(str, folders))}]", f"data.weights=[{','.join(map(str, weights))}]"]
    sizes = ["data.max_seq_len=32", "data.tokens_per_update=512", "training_tokens=51200", "schedule.warmup_updates=2"]
    return compose(["data=mixture", *given, "tokenizer=bytes", *sizes, *words])


def test_a_mixture_is_opened_folder_by_folder(tmp_path: Path) -> None:
    folders = []
    for parent, name, documents in (("x", "web", 60), ("y", "web", 30), ("x", "code", 30)):
        data = prepared(text(tmp_path, f"{parent}{name}", documents))
        folders.append(tmp_path / parent / name)
        folders[-1].parent.mkdir(exist_ok=True)
        data.folder.rename(folders[-1])
    run = mixture_of(folders, [2, 1, 1])
    data = prepare(run.data, run.tokenizer, silent)
    assert [(source.name, source.weight) for source in data.sources] == [("web", 0.5), ("web.2", 0.25), ("code", 0.25)]
    assert [source.folder for source in data.sources] == folders
    assert data.train_tokens == sum(source.train.tokens for source in data.sources)
    assert data.val_tokens == sum(source.val.tokens for source in data.sources if source.val is not None) > 0
    with pytest.raises(ValueError, match="too many values"):
        _ = data.train
    again = pickle.loads(pickle.dumps(data))
    stream, other = training_stream(run, data), training_stream(run, again)
    assert batch_hash(stream.batch(5, 40), 5, 40) == batch_hash(other.batch(5, 40), 5, 40)
    seeds = source_seeds(run.seed.data, 3)
    assert len({run.seed.data, *seeds}) == 4 and source_seeds(run.seed.data, 1) == [run.seed.data]
    for source, seed, one in zip(data.sources, seeds, stream.streams, strict=True):
        alone = TokenStream(source.train, max_seq_len=32, window=Window.contiguous, seed=seed)
        assert one.order(0, 50).tolist() == alone.order(0, 50).tolist()
    swapped = mixture_of([folders[1], folders[0], folders[2]], [2, 1, 1])
    assert prepare(swapped.data, swapped.tokenizer, silent).fingerprint != data.fingerprint

    first, second, _ = exposures(run, data)
    assert (first.share, first.windows, second.windows) == (0.5, 800, 400)
    windows = (data.sources[0].train.tokens - 1) // 32
    assert first.said == f"{800 / windows:.1f} epochs: each text is seen {800 // windows} or {800 // windows + 1} times"


def test_only_what_is_seen_again_is_said_to_be():
    def said(epochs: float) -> str:
        return Exposure("web", 0.5, 10, epochs).said

    assert [said(epochs) for epochs in (0.04, 0.5, 1.0)] == ["0.04 epochs", "0.5 epochs", "1.0 epochs"]
    assert said(2.0) == "2.0 epochs: each text is seen 2 times"
    assert said(2.5) == "2.5 epochs: each text is seen 2 or 3 times"


def test_folders_with_different_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    paths = [text(tmp_path, name, 40) for name in ("one", "two")]
    folders = [prepared(path, "tokenizer=bpe", "tokenizer.vocab_size=280").folder for path in paths]
    run = mixture_of(folders, [1, 1], "tokenizer=bpe", "tokenizer.vocab_size=280")
    with pytest.raises(ConfigError) as caught:
        prepare(run.data, run.tokenizer, silent)
    assert f"data.paths: {folders[1]} has another tokenizer than {folders[0]}; " in str(caught.value)


def test_every_folder_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    good = prepared(text(tmp_path, "good", 40)).folder
    run = mixture_of([good, tmp_path / "none", tmp_path / "nothing"], [1, 1, 1])
    assert isinstance(run.data, MixtureConfig)
    with pytest.raises(ConfigError) as caught:
        prepare(run.data, run.tokenizer, silent)
    assert [subject for subject, _ in caught.value.problems] == [f"data.paths: {tmp_path / name}" for name in ("none", "nothing")]


@pytest.mark.parametrize("window", list(Window))
@pytest.mark.parametrize("seed", range(4))
def test_no_held_out_document_is_ever_trained_on(tmp_path: Path, seed: int, window: Window) -> None:
    """Every document says its number and a word of its own, so that any three words of it give it away."""
    draw = np.random.default_rng(seed)
    folders, names = [], []
    for source in range(2):
        documents = int(draw.integers(25, 70))
        texts = [" ".join([f"q{source}q{number}q"] * int(draw.integers(2, 30))) for number in range(documents)]
        path = tmp_path / f"{source}.jsonl"
        path.write_text("\n".join(json.dumps({"text": one}) for one in texts), encoding="utf-8")
        folders.append(prepared(path, f"data.val_fraction={draw.uniform(0.1, 0.5):.2f}").folder)
        names += [f"q{source}q{number}q" for number in range(documents)]
    run = mixture_of(folders, [1.0, float(draw.uniform(0.5, 2))], f"data.window={window.name}")
    data = prepare(run.data, run.tokenizer, silent)
    held_out = b" ".join(
        bytes(source.val.read(0, source.val.tokens).clip(0, 255).astype(np.uint8)) for source in data.sources if source.val
    )
    stream = training_stream(run, data)
    count = 3 * max(int(one.windows / source.weight) for one, source in zip(stream.streams, data.sources, strict=True))
    batch = stream.batch(0, count)
    seen = set()
    for ids, targets in zip(batch.tokens.numpy(), batch.targets.numpy(), strict=True):
        window_text = bytes(np.append(ids[:1], targets[targets >= 0]).clip(0, 255).astype(np.uint8)).decode(errors="replace")
        seen |= {name for name in names if name in window_text}
    kept = {name for name in names if name.encode() not in held_out}
    assert 0 < len(kept) < len(names)
    assert seen == kept
