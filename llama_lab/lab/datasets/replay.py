"""`llama-lab data replay`: which windows every rank of a run was fed in an update, and whether that is what the run recorded.

Nothing is trained and no checkpoint is needed: what an update is fed follows from the run's config, its data and the update's
number.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.identity import load_config
from llama_lab.config.schema import Problem, RunConfig
from llama_lab.config.targets import IGNORE
from llama_lab.data.prepare import PreparedData
from llama_lab.data.shards import Split
from llama_lab.data.stream import Batch, Located, MixedStream, batch_hash, training_stream
from llama_lab.lab.patterns import RUN_HELP
from llama_lab.training.feed import share
from llama_lab.training.metrics import read_rows
from llama_lab.training.run_data import open_data, trained_on
from llama_lab.training.run_folder import RunFolder, find_run, relative

SHOWN_TOKENS = 24


def run_replay_command(words: list[str]) -> int:
    """Print what an update was fed, rank by rank, and compare it with what the run recorded.

    Args:
        words: what follows `data replay` on the command line.

    Returns:
        The exit code: 0 equal or not recorded, 1 different, 2 not understood.

    Raises:
        ConfigError: there is no such run or update, or its data cannot be opened.
    """
    try:
        asked = _parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    folder = find_run(asked.run)
    run = load_config(folder.path / "config.yaml")
    ranks = (run.hardware.processes or 1) if asked.ranks is None else asked.ranks
    _check(run, asked.update, ranks, asked.run)
    data = open_data(run, folder, print)
    if (then := trained_on(folder)) not in (None, data.fingerprint):
        print(f"The data is no longer what the run was trained on ({then[:12]} then, {data.fingerprint[:12]} now)")
    fed = _print_update(run, data, asked.update, ranks, decode=asked.tokens)
    return _compare(folder, asked.update, f"{fed:016x}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="llama-lab data replay", description="What a run was fed in an update, rank by rank.")
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN_HELP)
    parser.add_argument("--update", type=int, required=True, metavar="N", help="number of the update, from 1")
    parser.add_argument("--ranks", type=int, metavar="R", help="share it between so many processes; else as many as the run has")
    parser.add_argument("--tokens", action="store_true", help="also the text that each window begins with")
    return parser


def _check(run: RunConfig, update: int, ranks: int, path: Path) -> None:
    found: list[Problem] = []
    if not 1 <= update <= run.updates:
        found.append((f"--update {update}", f"is none of the updates of {relative(path.absolute())}, 1 to {run.updates}"))
    if not 1 <= ranks <= run.windows_per_update:
        rule = f"cannot share the {run.windows_per_update} windows of an update; 1 to {run.windows_per_update} can"
        found.append((f"--ranks {ranks}", rule))
    if found:
        raise ConfigError(found, scope="this request")


def _print_update(run: RunConfig, data: PreparedData, update: int, ranks: int, *, decode: bool) -> int:
    """Print the windows of each rank; returns their hash."""
    stream, windows = training_stream(run, data), run.windows_per_update
    begin = (update - 1) * windows
    length, last = run.data.max_seq_len, begin + windows - 1
    print(f"Update {update} of {run.updates}: windows {begin:,} to {last:,} of the run's order, {length} tokens each")
    print("Numbers count from 0, ranges end before their last number; a document's tokens include the one that ends it")
    fed = 0
    for rank in range(ranks):
        own = share(windows, rank, ranks)
        first = begin + own.start
        batch = stream.batch(first, len(own))
        fed += batch_hash(batch, first, len(own))
        print(f"Rank {rank} of {ranks}: {len(own)} {'window' if len(own) == 1 else 'windows'}")
        for row, place in enumerate(stream.located(first, len(own))):
            print("\n".join(_described(stream, data, place, first + row)))
            if decode:
                print(f"      | {_beginning(data, batch, row)}")
    return fed % 2**64


def _described(stream: MixedStream, data: PreparedData, place: Located, number: int) -> Iterator[str]:
    """Lines about one window: where it comes from, then a line for each document in it."""
    source, windows = data.sources[place.source], stream.streams[place.source].windows
    yield (
        f"  window {number:,}: {source.name}, epoch {place.epoch}, place {place.place:,} of {windows:,}, "
        f"tokens {place.start:,} to {place.stop:,}"
    )
    # What is beyond the last prediction is meant from the start.
    end = source.train.tokens - 1
    yield from _documents(source.train, place.start, min(place.stop, end))
    if place.stop > end:
        yield from _documents(source.train, 0, place.stop - end)


def _documents(split: Split, start: int, stop: int) -> Iterator[str]:
    """A line for each document that tokens start + 1 to stop, those predicted, belong to."""
    if split.starts_file is None:
        (file, first), (last_file, last) = split.locate(start + 1), split.locate(stop)
        end = f"{last + 1:,}" if file == last_file else f"{last + 1:,} of {last_file}"
        yield f"      {file}: tokens {first:,} to {end}"
        return
    starts = split.document_starts
    # Document d is predicted at positions starts[d] + 1, its first token, to starts[d + 1], the one that ends it.
    low, high = np.searchsorted(starts, [start + 1, stop], side="left").tolist()
    for document in range(low - 1, high):
        before, after = int(starts[document]), int(starts[document + 1])
        first, end = max(start, before) - before, min(stop, after) - before
        yield f"      {split.document_name(document)}: tokens {first:,} to {end:,} of {after - before:,}"


def _beginning(data: PreparedData, batch: Batch, row: int) -> str:
    """The text that a window begins with, in one line."""
    ids = batch.tokens[row, : int((batch.targets[row] != IGNORE).sum())][:SHOWN_TOKENS]
    text = data.tokenizer.decode(ids.numpy())
    return "".join("⏎" if letter == "\n" else letter if letter.isprintable() else "·" for letter in text)


def _compare(folder: RunFolder, update: int, fed: str) -> int:
    recorded = {row["update"]: row["hash"] for row in read_rows(folder.path / "batches.jsonl")}
    if update not in recorded:
        most = max(recorded, default=0)
        has = f"it has recorded updates up to {most}" if most else "it has recorded none"
        print(f"Hash {fed}; the run has not recorded this update ({has})")
        return 0
    if recorded[update] == fed:
        print(f"Hash {fed}, equal to the one that the run recorded")
        return 0
    print(f"Hash {fed}, but the run recorded {recorded[update]}: it was fed something else")
    return 1
