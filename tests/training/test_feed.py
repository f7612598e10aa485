"""How training is fed: ahead of time, in the same order and with the same weight for every token, whoever has which share."""

import json
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_lab import compose, train
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import Compile, RunConfig
from llama_lab.config.targets import IGNORE
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.data.stream import MixedStream, batch_hash, training_stream
from llama_lab.training.feed import DEPTH, Feed, MicroBatch, share
from llama_lab.training.metrics import read_rows, short_count
from llama_lab.training.processes.worker import Place, Worker

from .conftest import final_weights, tiny_overrides


def largest_difference(first: Path, second: Path) -> float:
    expected, found = final_weights(first), final_weights(second)
    return max(float((expected[name] - found[name]).abs().max()) for name in expected)


def prepared(run: RunConfig) -> PreparedData:
    return prepare(run.data, run.tokenizer, lambda text: None)


def fed(run: RunConfig, stream: MixedStream, place: Place, first: int = 1, last: int | None = None) -> list[list[MicroBatch]]:
    """The micro-batches of each update, as one process is given them."""
    worker = Worker(place, torch.device("cpu"))
    last = run.updates if last is None else last
    with Feed(stream, run, worker, first_update=first, last_update=last) as feed:
        return [list(feed.update()) for _ in range(first, last + 1)]


@pytest.mark.parametrize(("windows", "ranks"), [(8, 3), (16, 1), (5, 5), (17, 4)])
def test_shares_are_contiguous_and_differ_by_one_window_at_most(windows, ranks):
    shares = [share(windows, rank, ranks) for rank in range(ranks)]
    assert [number for own in shares for number in own] == list(range(windows))
    assert {len(own) for own in shares} <= {windows // ranks, -(-windows // ranks)}


@pytest.mark.parametrize("window", ["contiguous", "document", "packed"])
def test_any_shares_and_micro_batches_feed_the_same(tiny, window):
    run = resolve(tiny(f"data.window={window}"))
    data = prepared(run)
    stream, windows = training_stream(run, data), run.windows_per_update
    for world_size, micro_batch in ((1, 5), (3, 4), (5, 3), (16, 1)):
        split = replace(run, hardware=replace(run.hardware, micro_batch=micro_batch))
        ranks = [fed(split, training_stream(run, data), Place(rank, world_size), 3, 5) for rank in range(world_size)]
        for number, update in enumerate((3, 4, 5)):
            begin = (update - 1) * windows
            expected = stream.batch(begin, windows)
            parts = [part for rank in ranks for part in rank[number]]
            for position, whole in enumerate(expected):
                if whole is not None:
                    assert torch.equal(torch.cat([part.batch[position] for part in parts]), whole)
            assert all(len(part.batch.tokens) <= micro_batch for part in parts)
            assert [part.is_last for rank in ranks for part in rank[number]].count(True) == world_size
            assert {part.update_predicted for part in parts} == {int((expected.targets != IGNORE).sum())}
            assert sum(part.predicted for part in parts) == parts[0].update_predicted
            assert sum(part.hash for part in parts) % 2**64 == batch_hash(expected, begin, windows)


def test_a_compiled_model_is_given_one_shape(tiny):
    run = resolve(tiny("data.window=packed", "hardware.micro_batch=7"))
    plain = fed(run, training_stream(run, prepared(run)), Place(), 1, 2)
    compiled_run = replace(run, hardware=replace(run.hardware, compile=Compile.always))
    filled = fed(compiled_run, training_stream(run, prepared(run)), Place(), 1, 2)
    assert [len(part.batch.tokens) for part in plain[0]] == [7, 7, 2]
    for one, other in zip(plain[0] + plain[1], filled[0] + filled[1], strict=True):
        count = len(one.batch.tokens)
        assert all(part.shape == (7, 32) for part in other.batch if part is not None)
        assert all(
            torch.equal(a, b[:count]) for a, b in zip(one.batch, other.batch, strict=True) if a is not None and b is not None
        )
        assert (other.batch.targets[count:] == IGNORE).all()
        assert (one.hash, one.predicted, one.update_predicted) == (other.hash, other.predicted, other.update_predicted)


def test_reading_ahead_is_bounded_and_ends_with_the_loop(tiny):
    run = resolve(tiny("hardware.micro_batch=1"))
    stream = training_stream(run, prepared(run))
    asked: list[int] = []
    ahead, batch = threading.Event(), stream.batch

    def counted(first: int, count: int):
        asked.append(first)
        if len(asked) > DEPTH:
            ahead.set()
        return batch(first, count)

    stream.batch = counted
    before = threading.active_count()
    with Feed(stream, run, Worker(Place(), torch.device("cpu")), first_update=1, last_update=run.updates) as feed:
        # One in hand beside those that wait; with nothing taken there is never more.
        assert ahead.wait(30)
        taken = [next(iter(feed.update())) for _ in range(3)]
        assert len(asked) <= DEPTH + 1 + len(taken)
    assert threading.active_count() == before
    assert asked == list(range(len(asked)))
    assert feed.waited > 0


def test_what_reading_raises_reaches_the_loop(tiny):
    run = resolve(tiny())
    data = prepared(run)
    source = data.sources[0]
    # As if the files had been replaced by shorter ones.
    short = replace(source.train, tokens=source.train.tokens // 2)
    stream = training_stream(run, data)
    stream.streams[0]._split = short
    before = threading.active_count()
    worker = Worker(Place(), torch.device("cpu"))
    with (
        pytest.raises(IndexError, match="ids "),
        Feed(stream, run, worker, first_update=1, last_update=run.updates) as feed,
    ):
        for _ in range(run.updates):
            list(feed.update())
    assert threading.active_count() == before


@pytest.mark.parametrize("window", ["contiguous", "packed"])
def test_three_processes_equal_one_on_eight_windows(tiny, window):
    words = [
        "optim=adamw",
        f"data.window={window}",
        "data.tokens_per_update=256",
        "training_tokens=5120",
        "eval=null",
        "sample=null",
    ]
    one = train(tiny(*words))
    three = train(tiny(*words, "hardware.processes=3", "hardware.micro_batch=2", "name=three"))
    assert largest_difference(one.folder, three.folder) < 2e-6
    rows = read_rows(one.folder / "batches.jsonl")
    assert rows == read_rows(three.folder / "batches.jsonl")
    assert [row["update"] for row in rows] == list(range(1, 21))
    assert len({row["hash"] for row in rows}) == 20
    losses = [[row["train/loss"] for row in read_rows(run.folder / "metrics.jsonl") if "train/loss" in row] for run in (one, three)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_packed_windows_train_alike_in_any_micro_batch(tiny, micro_batch):
    whole = train(tiny("optim=adamw", "data.window=packed"))
    split = train(tiny("optim=adamw", "data.window=packed", f"hardware.micro_batch={micro_batch}", "name=split"))
    assert largest_difference(whole.folder, split.folder) < 1e-5


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two prepared folders, `letters` and `digits`."""
    found, draw = [], random.Random(0)
    for name, alphabet in (("letters", "abcd "), ("digits", "0123456789 ")):
        documents = ["".join(draw.choices(alphabet, k=draw.randint(20, 200))) for _ in range(60)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
        run = compose([*tiny_overrides(path)])
        found.append(prepared(run).folder.rename(tmp_path / name))
    return found


def test_a_mixture_counts_and_validates_each_source(tiny, folders, capsys):
    words = [word for word in tiny_overrides(Path()) if not word.startswith(("data=", "data.path="))]
    words += ["data=mixture", f"data.paths=[{','.join(map(str, folders))}]", "data.weights=[3,1]", "optim=adamw"]
    one = train(compose(words))
    out = capsys.readouterr().out
    rows = read_rows(one.folder / "metrics.jsonl")
    last = [row for row in rows if "train/loss" in row][-1]
    assert (last["data/letters/tokens"], last["data/digits/tokens"]) == (7680, 2560)
    assert last["tokens"] == 10240
    data = prepared(compose(words))
    for source, given in zip(data.sources, (240, 80), strict=True):
        epochs = given / ((source.train.tokens - 1) // 32)
        assert last[f"data/{source.name}/epochs"] == pytest.approx(epochs)
        share_said = {"letters": "75.0", "digits": "25.0"}[source.name]
        assert f"Data: {source.name} gives {share_said} %, {short_count(source.train.tokens)} tokens, {epochs:.1f} epochs" in out
    validation = [row for row in rows if "val/loss" in row][-1]
    sizes = [min(500, source.val.tokens - 1) for source in data.sources if source.val is not None]
    parts = [validation["val/letters/loss"], validation["val/digits/loss"]]
    together = sum(size * part for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
    assert validation["val/loss"] == pytest.approx(together, rel=1e-9)
    assert parts[0] < parts[1]
    assert validation["val/letters/bits_per_byte"] < validation["val/bits_per_byte"] < validation["val/digits/bits_per_byte"]

    two = train(compose([*words, "hardware.processes=2", "name=two"]))
    assert largest_difference(one.folder, two.folder) < 1e-6
    assert read_rows(two.folder / "batches.jsonl") == read_rows(one.folder / "batches.jsonl")


def test_the_wait_for_data_is_logged(tiny):
    rows = [row for row in read_rows(train(tiny()).folder / "metrics.jsonl") if "train/loss" in row]
    assert all(0 <= row["speed/data_wait"] < 1 for row in rows)
    assert not any(key.startswith("data/") for row in rows for key in row)
