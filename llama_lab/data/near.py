"""Near duplicates: documents that share about four fifths of their five-word sequences, found without comparing all pairs.

A document's signature has `HASHES` numbers, and two documents agree in about as many of them as they share of all sequences that
either has (their Jaccard similarity). The numbers are divided into bands; only documents that agree in a whole band are compared,
by their signatures. So of documents with a similarity of 0.8, 99.8 % are compared; of 0.9, all; of 0.5, 27 %. The bands lie on disk
and are sorted a part at a time.

Source: Broder 1997 (MinHash); Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4 (bands).
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llama_lab.data.reading import require

SHINGLE_WORDS = 5
BANDS, BAND_HASHES = 20, 6
HASHES = BANDS * BAND_HASHES
# Of all hashes: 0.8.
NEAR_HASHES = HASHES * 4 // 5
SEED = 1
# Documents that are sorted at once.
BUCKET_ITEMS = 1 << 21
# Pairs whose signatures are held at once.
PAIRS = 1 << 16
# Where very many documents agree in a band and in little else, each is compared with no more than so many.
MAX_ROUNDS = 1000
# Odd numbers without a pattern in their bits: the fraction of the golden ratio, and two of MurmurHash3's.
STIR, FIRST_MIX, SECOND_MIX = np.array([0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53], np.uint64)


def require_signer() -> None:
    """Import what signatures are made with.

    Raises:
        ConfigError: it is not installed.
    """
    require("rensa", "data.dedup=near")


def signer_version() -> str:
    """Signatures of one version may be compared."""
    return importlib.metadata.version("rensa")


class Signer:
    """Makes signatures."""

    def __init__(self) -> None:
        self._min_hash = require("rensa", "data.dedup=near").RMinHash

    def sign(self, words: list[str]) -> np.ndarray:
        """Signature of a text.

        Args:
            words: at least one; fewer than five count as one sequence.

        Returns:
            (HASHES,) uint16: the lower halves of the smallest hashes, which are as good as the whole for telling them apart.
        """
        hashes = np.array(self._min_hash.hash_token_sets([words])[0], np.uint64)
        hashes = np.pad(hashes, (0, max(0, SHINGLE_WORDS - len(hashes))))
        count = len(hashes) - SHINGLE_WORDS + 1
        shingles = np.zeros(count, np.uint64)
        for place in range(SHINGLE_WORDS):
            shingles = _mixed(shingles * STIR + hashes[place : place + count])
        offsets = np.array([0, count], np.uint64)
        rows = self._min_hash.digest_matrix_from_flat_token_hashes(shingles, offsets, HASHES, SEED).to_rows()
        return np.array(rows[0], np.uint32).astype(np.uint16)


class Signatures:
    """Signatures on disk, in files one after another.

    Args:
        files: each with the number of signatures in it.
    """

    def __init__(self, files: list[tuple[Path, int]]):
        self._files = [(path, count) for path, count in files if count]
        self._starts = np.cumsum([0, *(count for _, count in self._files)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def blocks(self) -> Iterator[np.ndarray]:
        """All of them in their order, (n, HASHES) at a time."""
        for path, count in self._files:
            with path.open("rb") as file:
                while count:
                    size = min(count, PAIRS)
                    yield np.fromfile(file, np.uint16, size * HASHES).reshape(size, HASHES)
                    count -= size

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Signatures of some rows, (len(rows), HASHES)."""
        found = np.empty((len(rows), HASHES), np.uint16)
        homes = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(homes, kind="stable")
        bounds = np.flatnonzero(np.diff(homes[order])) + 1
        for places in np.split(order, bounds) if len(rows) else ():
            path, count = self._files[homes[places[0]]]
            stored = np.memmap(path, np.uint16, "r", shape=(count, HASHES))
            found[places] = stored[rows[places] - self._starts[homes[places[0]]]]
        return found


def near_duplicates(signatures: Signatures, alive: np.ndarray, folder: Path, progress: Callable[[int], None]) -> np.ndarray:
    """Documents that are near an earlier one.

    Every one that is found agrees with an earlier document in at least four fifths of their signatures, and no two that are left
    agree so far and in a band, but for those beyond `MAX_ROUNDS`. An earlier document counts even if it is itself near another.

    Args:
        alive: for each signature, whether its document is compared.
        folder: for the bands, which are removed at the end: 8 bytes a document and band.
        progress: told the number of bands that are done.

    Returns:
        For each signature, whether its document is near an earlier one.
    """
    found = np.zeros(len(signatures), bool)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"band-{band:02}" for band in range(BANDS)]
    files = [path.open("wb") for path in paths]
    try:
        for block in signatures.blocks():
            for file, keys in zip(files, _band_keys(block), strict=True):
                file.write(keys.tobytes())
    finally:
        for file in files:
            file.close()
    for band, path in enumerate(paths):
        for rows, groups in _groups(path, alive):
            _compare(signatures, rows, groups, found)
        path.unlink()
        progress(band + 1)
    return found


def _band_keys(signatures: np.ndarray) -> np.ndarray:
    """(BANDS, n) uint64; equal where all hashes of a band are."""
    bands = signatures.astype(np.uint64).reshape(len(signatures), BANDS, BAND_HASHES)
    keys = np.zeros((len(signatures), BANDS), np.uint64)
    for place in range(BAND_HASHES):
        keys = _mixed(keys * STIR + bands[:, :, place] + np.uint64(1))
    return np.ascontiguousarray(keys.T)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """A permutation of 64-bit numbers after which every bit depends on most others."""
    numbers = (numbers ^ (numbers >> np.uint64(32))) * FIRST_MIX
    numbers = (numbers ^ (numbers >> np.uint64(29))) * SECOND_MIX
    return numbers ^ (numbers >> np.uint64(32))


def _groups(path: Path, alive: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that share a key with another, ordered by key and then by row, with the number of their key."""
    buckets = max(1, -(-len(alive) // BUCKET_ITEMS))
    for bucket in range(buckets):
        rows, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        with path.open("rb") as file:
            for start in range(0, len(alive), BUCKET_ITEMS):
                block = np.fromfile(file, np.uint64, min(BUCKET_ITEMS, len(alive) - start))
                chosen = alive[start : start + len(block)] & bucket_of(block, buckets, bucket)
                rows.append(np.flatnonzero(chosen) + start)
                keys.append(block[chosen])
        all_rows, all_keys = np.concatenate(rows), np.concatenate(keys)
        order = np.argsort(all_keys, kind="stable")
        all_rows, all_keys = all_rows[order], all_keys[order]
        same = all_keys[1:] == all_keys[:-1]
        shared = np.r_[False, same] | np.r_[same, False]
        if shared.any():
            yield all_rows[shared], np.cumsum(~np.r_[False, same])[shared]


def bucket_of(hashes: np.ndarray, buckets: int, bucket: int) -> np.ndarray:
    """Whether each hash belongs to one of so many buckets of about equal size."""
    if buckets == 1:
        return np.ones(len(hashes), bool)
    return ((hashes >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32) == np.uint64(bucket)


def _compare(signatures: Signatures, rows: np.ndarray, groups: np.ndarray, found: np.ndarray) -> None:
    """In each group, drop what is near the first row, then put the first aside, and again, until each stands alone."""
    for _ in range(MAX_ROUNDS):
        if not len(rows):
            return
        first = np.r_[True, groups[1:] != groups[:-1]]
        firsts = rows[np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))]
        settled = first.copy()
        for start in range(0, len(rows), PAIRS):
            later = start + np.flatnonzero(~first[start : start + PAIRS])
            agree = (signatures.at(rows[later]) == signatures.at(firsts[later])).sum(axis=1)
            settled[later] = agree >= NEAR_HASHES
            found[rows[later[agree >= NEAR_HASHES]]] = True
        rows, groups = rows[~settled], groups[~settled]
        same = groups[1:] == groups[:-1]
        shared = np.r_[False, same] | np.r_[same, False] if len(rows) else np.zeros(0, bool)
        rows, groups = rows[shared], groups[shared]
