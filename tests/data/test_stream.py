"""The stream: each token as often as promised, in an order that depends on seed and index alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Window
from llama_lab.config.targets import IGNORE
from llama_lab.data import stream as streams
from llama_lab.data import windows
from llama_lab.data.shards import FORMAT_VERSION, Split, open_split, read_manifest, token_dtype
from llama_lab.data.stream import Batch, TokenStream, batch_hash, permute
from llama_lab.data.writer import SplitWriter, write_manifest
from llama_lab.training.feed import share

EOS = 1
VOCAB = 60_000


@pytest.fixture
def make(tmp_path: Path):
    """Builds a split whose text ids are all different, so that each says where it stands."""

    def build(lengths: list[int], shard_tokens: int = 37) -> Split:
        folder = tmp_path / f"split{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        following = 2
        with SplitWriter(folder, "train", vocab_size=VOCAB, eos_id=EOS, shard_tokens=shard_tokens) as writer:
            for length in lengths:
                writer.add(np.arange(following, following + length), 3 * length)
                following += length
            described = writer.close()
        manifest = {
            "format_version": FORMAT_VERSION,
            "token_dtype": token_dtype(VOCAB).name,
            "tokenizer": {"hash": "h", "vocab_size": VOCAB, "eos_id": EOS},
            "splits": {"train": described},
            "source": {"data": "test", "tokenizer": "test"},
        }
        write_manifest(folder, manifest)
        split = open_split(folder, read_manifest(folder, "it"), "train")
        assert split is not None
        return split

    return build


def random_lengths(seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 60, size=rng.integers(1, 20)).tolist()


def rows_of(batch: Batch, first: int, count: int) -> Batch:
    """Some windows of a batch."""
    return Batch(*(None if part is None else part[first : first + count] for part in batch))


def equal(one: Batch, other: Batch) -> bool:
    """Whether two batches are the same to the bit."""
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 100, 1000, 65_537])
def test_the_permutation_hits_everything_once(size: int) -> None:
    indices = np.arange(size)
    places = permute(indices, size, "7 0")
    assert sorted(places.tolist()) == indices.tolist()
    picked = np.array([0, size - 1, size // 2])
    assert permute(picked, size, "7 0").tolist() == places[picked].tolist()


def test_the_permutation_is_even_and_differs_from_key_to_key() -> None:
    size, keys = 12, 6000
    hits = np.zeros((size, size))
    for key in range(keys):
        hits[np.arange(size), permute(np.arange(size), size, str(key))] += 1
    # 121 degrees of freedom: a fair shuffle exceeds 200 once in a hundred thousand.
    assert ((hits - keys / size) ** 2 / (keys / size)).sum() < 200
    large = permute(np.arange(100_000), 100_000, "x")
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 0.02
    assert (np.diff(large) == 1).mean() < 0.001
    assert permute(np.array([0, 1]), 2**62, "x").max() < 2**62


def on_ring(whole: np.ndarray, offset: int, length: int, windows: int) -> list[tuple[list[int], list[int]]]:
    """Windows from an offset on, where behind the last prediction comes the first again."""
    inputs, answers = np.tile(whole[:-1], 2), np.tile(whole[1:], 2)
    starts = [(offset + window * length) % (len(whole) - 1) for window in range(windows)]
    return sorted((inputs[start : start + length].tolist(), answers[start : start + length].tolist()) for start in starts)


@pytest.mark.parametrize("seed", range(8))
def test_each_contiguous_window_comes_once_an_epoch(make, seed: int) -> None:
    lengths = random_lengths(seed)
    split = make(lengths)
    for length in (1, 2, 7, 16):
        if split.tokens - 1 < length:
            continue
        stream = TokenStream(split, max_seq_len=length, window=Window.contiguous, seed=seed)
        assert stream.windows == (split.tokens - 1) // length
        whole = split.read(0, split.tokens).astype(np.int64)
        used = set()
        for epoch in range(4):
            tokens, targets, _ = stream.batch(epoch * stream.windows, stream.windows)
            assert tokens.dtype == targets.dtype == torch.int64
            assert tokens.is_contiguous() and targets.is_contiguous()
            rows = sorted(zip(tokens.tolist(), targets.tolist(), strict=True))

            found = [offset for offset in range(length) if rows == on_ring(whole, offset, length, stream.windows)]
            assert found
            assert epoch > 0 or found[0] == 0
            used.update(found)
        assert length < 7 or stream.windows < 3 or len(used) > 1


@pytest.mark.parametrize("window", list(Window))
def test_the_order_depends_on_seed_and_index_alone(make, window: Window) -> None:
    split = make([50, 3, 90, 21, 70])
    stream = TokenStream(split, max_seq_len=8, window=window, seed=3)
    everything = stream.batch(0, 3 * stream.windows + 5)
    for parts in (1, 2, 3, 4, 8):
        again = TokenStream(split, max_seq_len=8, window=window, seed=3)
        for first in range(0, 3 * stream.windows, parts):
            assert equal(again.batch(first, parts), rows_of(everything, first, parts))
    epochs = [tuple(stream.order(epoch * stream.windows, stream.windows).tolist()) for epoch in range(4)]
    assert len(set(epochs)) == 4
    assert TokenStream(split, max_seq_len=8, window=window, seed=4).order(0, 9).tolist() != stream.order(0, 9).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_document_windows_predict_every_token_once_and_never_cross(make, seed: int, shuffle: bool) -> None:
    lengths = random_lengths(seed)
    split = make(lengths)
    for length in (1, 4, 16):
        stream = TokenStream(split, max_seq_len=length, window=Window.document, seed=seed, shuffle=shuffle)
        assert stream.windows == sum(-(-(document + 1) // length) for document in lengths)
        tokens, targets, _ = stream.batch(0, stream.windows)
        assert int((targets != IGNORE).sum()) == stream.predicted_tokens == split.tokens - 1
        assert sorted(targets[targets != IGNORE].tolist()) == sorted(split.read(1, split.tokens).tolist())
        starts = set(split.read(0, split.tokens)[split.document_starts[:-1] + 1].tolist())
        for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
            kept = [target for target in wanted if target != IGNORE]
            assert wanted == kept + [IGNORE] * (length - len(kept))
            assert EOS not in kept[:-1]
            assert row[1 : len(kept)] == kept[:-1]
            assert row[0] == (EOS if kept[0] in starts else kept[0] - 1) or kept == [EOS]


def next_fit(lengths: list[int], length: int) -> list[list[tuple[int, int]]]:
    """Packed windows as the rule says it, a document after the other: (document, positions of it) each."""
    windows: list[list[tuple[int, int]]] = []
    room = 0
    for document, left in enumerate(positions + 1 for positions in lengths):
        if left > room:
            for _ in range((left - 1) // length):
                windows.append([(document, length)])
                left -= length
            windows.append([])
            room = length
        windows[-1].append((document, left))
        room -= left
    return windows


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_packed_windows_are_filled_by_next_fit_and_predict_every_token_once(make, monkeypatch, seed: int, shuffle: bool) -> None:
    monkeypatch.setattr(windows, "PACKED_AT_ONCE", 3)
    lengths = random_lengths(seed)
    split = make(lengths)
    whole = split.read(0, split.tokens).astype(np.int64)
    for length in (1, 4, 16, 100):
        stream = TokenStream(split, max_seq_len=length, window=Window.packed, seed=seed, shuffle=shuffle)
        expected = next_fit(lengths, length)
        assert stream.windows == len(expected)
        tokens, targets, documents = stream.batch(stream.windows, stream.windows)
        assert documents is not None
        assert int((targets != IGNORE).sum()) == stream.predicted_tokens == split.tokens - 1
        assert stream.predicted(stream.windows, stream.windows) == stream.predicted_tokens
        order = stream.order(stream.windows, stream.windows).tolist()
        assert sorted(order) == list(range(len(expected)))
        starts = np.concatenate([[0], np.cumsum([sum(size for _, size in window) for window in expected])])
        for row, place in enumerate(order):
            filled = int(starts[place + 1] - starts[place])
            assert tokens[row].tolist() == [*whole[starts[place] : starts[place + 1]], *[0] * (length - filled)]
            assert targets[row, :filled].tolist() == whole[starts[place] + 1 : starts[place + 1] + 1].tolist()
            assert set(targets[row, filled:].tolist()) <= {IGNORE}
            sizes = [*(size for _, size in expected[place]), length - filled]
            assert documents[row].tolist() == np.repeat(np.arange(len(sizes)), sizes).tolist()


def test_windows_that_need_documents_say_so_where_none_are_known(make) -> None:
    split = replace(make([50, 20]), starts_file=None, bytes_file=None, documents=0, text_bytes=0)
    assert TokenStream(split, max_seq_len=8, window=Window.contiguous).text_bytes == 0
    for window in (Window.document, Window.packed):
        with pytest.raises(ConfigError, match=rf"window={window.name} needs to know where documents begin, .*=contiguous works"):
            TokenStream(split, max_seq_len=8, window=window)


@pytest.mark.parametrize("window", list(Window))
@pytest.mark.parametrize("seed", range(6))
def test_any_number_of_ranks_and_any_resume_point_give_the_same_order_and_hash(make, seed: int, window: Window) -> None:
    draw = np.random.default_rng(seed)
    split = make(draw.integers(1, 90, size=draw.integers(4, 30)).tolist())
    length, per_update = int(draw.integers(2, 17)), int(draw.integers(8, 20))
    data_seed, updates = int(draw.integers(2**40)), 6
    whole = TokenStream(split, max_seq_len=length, window=window, seed=data_seed)
    everything = whole.batch(0, updates * per_update)
    hashes = [
        batch_hash(whole.batch(update * per_update, per_update), update * per_update, per_update) for update in range(updates)
    ]
    for ranks in (1, 2, 3, 4, 8):
        resumed = int(draw.integers(updates))
        stream = TokenStream(split, max_seq_len=length, window=window, seed=data_seed)
        for update in range(resumed, updates):
            fed, seen = 0, []
            for rank in range(ranks):
                own = share(per_update, rank, ranks)
                assert len(own) in (per_update // ranks, -(-per_update // ranks))
                first = update * per_update + own.start
                batch = stream.batch(first, len(own))
                assert equal(batch, rows_of(everything, first, len(own)))
                fed += batch_hash(batch, first, len(own))
                seen += [first + number for number in range(len(own))]
            assert seen == list(range(update * per_update, (update + 1) * per_update))
            assert fed % 2**64 == hashes[update]
    assert len(set(hashes)) == updates


@pytest.mark.parametrize("window", list(Window))
def test_each_window_comes_once_an_epoch_across_blocks_of_the_order(make, monkeypatch, window: Window) -> None:
    split = make(np.random.default_rng(5).integers(1, 40, size=60).tolist())
    stream = TokenStream(split, max_seq_len=8, window=window, seed=1)
    orders = [stream.order(epoch * stream.windows, stream.windows).tolist() for epoch in range(5)]
    assert all(sorted(order) == list(range(stream.windows)) for order in orders)
    batch = stream.batch(3, 4 * stream.windows)
    monkeypatch.setattr(streams, "BLOCK", 7)
    blocks = TokenStream(split, max_seq_len=8, window=window, seed=1)
    assert [blocks.order(epoch * blocks.windows, blocks.windows).tolist() for epoch in range(5)] == orders
    assert equal(blocks.batch(3, 4 * blocks.windows), batch)
    assert blocks.predicted(3, 4 * blocks.windows) == int((batch.targets != IGNORE).sum())


def test_the_hash_sees_every_token_target_document_and_place(make) -> None:
    split = make([50, 3, 90, 21, 70])
    stream = TokenStream(split, max_seq_len=8, window=Window.packed, seed=3)
    batch = stream.batch(5, 6)
    known = batch_hash(batch, 5, 6)
    assert known == batch_hash(stream.batch(5, 6), 5, 6) != batch_hash(batch, 6, 6)
    parts = [batch_hash(stream.batch(first, count), first, count) for first, count in ((5, 1), (6, 3), (9, 2))]
    assert sum(parts) % 2**64 == known
    for part in batch:
        assert part is not None
        part[4, 7] += 1
        assert batch_hash(batch, 5, 6) != known
        part[4, 7] -= 1
    # Windows that only fill a batch up do not count.
    assert batch_hash(batch, 5, 4) == batch_hash(stream.batch(5, 4), 5, 4) != known


@pytest.mark.parametrize("max_tokens", [None, 1, 10, 40, 10_000])
@pytest.mark.parametrize("window", list(Window))
def test_validation_predicts_each_token_once_in_order(make, window: Window, max_tokens: int | None) -> None:
    split = make([50, 1, 30, 7])
    stream = TokenStream(split, max_seq_len=16, window=window, shuffle=False, max_tokens=max_tokens)
    predicted = min(split.tokens - 1, max_tokens or split.tokens)
    targets = torch.cat([batch.targets for batch in stream.batches(4)]).flatten()
    assert targets[targets != IGNORE].tolist() == split.read(1, predicted + 1).tolist()
    assert stream.predicted_tokens == predicted
    # Three bytes a token, none for the end of a document.
    assert stream.text_bytes == 3 * int((split.read(1, predicted + 1) != EOS).sum())
    for world_size in (1, 2, 3, 5):
        parts = [torch.cat([torch.empty(0, 16), *(batch.targets for batch in stream.batches(2, rank=rank, world_size=world_size))])
                 for rank in range(world_size)]  # fmt: skip
        shared = torch.cat(parts)
        assert sorted(shared[shared != IGNORE].tolist()) == sorted(targets[targets != IGNORE].tolist())


def test_too_little_text_for_one_window_is_a_problem_of_the_config(make) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_seq_len=64 is more than the 11 tokens there are to predict"):
        TokenStream(make([10]), max_seq_len=64, window=Window.contiguous)
    assert TokenStream(make([10]), max_seq_len=64, window=Window.contiguous, shuffle=False).windows == 1
    assert TokenStream(make([10]), max_seq_len=64, window=Window.document).windows == 1


def test_a_set_of_fifty_billion_tokens_opens_at_once(tmp_path: Path) -> None:
    tokens, size = 50_000_000_000, 2**27
    files = []
    for number in range(-(-tokens // size)):
        count = min(size, tokens - number * size)
        with (tmp_path / f"train-{number:05d}.bin").open("wb") as file:
            try:
                file.truncate(2 * count)
            except OSError:
                pytest.skip("no sparse files here")
        files.append({"file": f"train-{number:05d}.bin", "bytes": 2 * count, "sha256": ""})
    if sum((tmp_path / file["file"]).stat().st_blocks for file in files) > 1000:
        pytest.skip("no sparse files here")
    np.array([0, tokens - 1], dtype="<i8").tofile(tmp_path / "train-starts.bin")
    np.array([0, 1], dtype="<i8").tofile(tmp_path / "train-bytes.bin")
    np.array([0, 0], dtype="<i8").tofile(tmp_path / "train-ids.bin")
    tables = {f"document_{name}": {"file": f"train-{name}.bin", "bytes": 16, "sha256": ""} for name in ("starts", "bytes", "ids")}
    described = {"tokens": tokens, "documents": 1, "text_bytes": 1, "max_id": 0, "shards": files, **tables}
    manifest = {"format_version": FORMAT_VERSION, "token_dtype": "uint16", "splits": {"train": described}}
    manifest |= {"tokenizer": {"hash": "", "vocab_size": 2, "eos_id": 1}, "source": {"data": "test", "tokenizer": "test"}}
    write_manifest(tmp_path, manifest)
    split = open_split(tmp_path, read_manifest(tmp_path, "it"), "train")
    assert split is not None
    stream = TokenStream(split, max_seq_len=2048, window=Window.contiguous, seed=0)
    assert stream.windows == 24_414_062
    assert stream.batch(10**9, 4).tokens.shape == (4, 2048)
    assert len(split._maps._open) <= 4
