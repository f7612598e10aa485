"""Near duplicates: those that are meant are found, no others, and in the same way whatever is sorted at once."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from llama_lab.config.schema import Dedup, TextConfig
from llama_lab.data import near
from llama_lab.data.cache import ContentHashes
from llama_lab.data.near import BANDS, HASHES, NEAR_HASHES, Signatures, Signer, near_duplicates
from llama_lab.data.text import TextSource

WORDS = [f"word{number}" for number in range(3000)]


def changed(words: list[str], count: int, chance: random.Random) -> list[str]:
    """A copy with some words replaced; each spoils the five sequences that it is in."""
    copy = words.copy()
    for place in chance.sample(range(0, len(words) - 5, 10), count):
        copy[place + 4] = f"new{chance.random()}"
    return copy


def similarity(one: list[str], other: list[str]) -> float:
    first, second = ({tuple(words[start : start + 5]) for start in range(len(words) - 4)} for words in (one, other))
    return len(first & second) / len(first | second)


def store(folder: Path, signatures: list[np.ndarray], sizes: list[int]) -> Signatures:
    files, start = [], 0
    for number, size in enumerate(sizes):
        np.array(signatures[start : start + size], np.uint16).tofile(folder / f"{number}.signatures")
        files.append((folder / f"{number}.signatures", size))
        start += size
    return Signatures(files)


@pytest.fixture(scope="module")
def documents() -> list[list[str]]:
    """Families of copies that differ more and more, in a random order."""
    chance = random.Random(0)
    found = []
    for _ in range(30):
        base = chance.choices(WORDS, k=400)
        found += [base, *(changed(base, count, chance) for count in (1, 2, 4, 8, 20, 39))]
    chance.shuffle(found)
    return [*found, ["short"], ["a", "short", "one"], *(chance.choices(WORDS[:4], k=8) for _ in range(20))]


def test_signatures_agree_as_far_as_texts_do(documents: list[list[str]]) -> None:
    signer = Signer()
    signed = [signer.sign(words) for words in documents[:60]]
    assert all(signature.shape == (HASHES,) and signature.dtype == np.uint16 for signature in signed)
    errors = [
        (signed[one] == signed[other]).mean() - similarity(documents[one], documents[other])
        for one in range(60)
        for other in range(one)
        if similarity(documents[one], documents[other]) > 0.1
    ]
    assert len(errors) > 20
    assert abs(np.mean(errors)) < 0.03
    assert max(map(abs, errors)) < 0.17  # four standard deviations


@pytest.mark.parametrize("size", [40, 1 << 20])
def test_what_is_dropped_is_near_and_what_is_left_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: list[list[str]], size: int
) -> None:
    monkeypatch.setattr(near, "BUCKET_ITEMS", size)
    monkeypatch.setattr(near, "PAIRS", size)
    signer = Signer()
    signed = [signer.sign(words) for words in documents]
    chance = random.Random(1)
    sizes = [0, 50, 1, 70, 0]
    signatures = store(tmp_path, signed, [*sizes, len(signed) - sum(sizes)])
    alive = np.array([chance.random() < 0.9 for _ in signed])
    done: list[int] = []
    dropped = near_duplicates(signatures, alive, tmp_path / "bands", done.append)
    assert done == list(range(1, BANDS + 1))
    assert list((tmp_path / "bands").iterdir()) == []
    agree = np.array([[(one == other).sum() for other in signed] for one in signed])
    bands = np.array(signed).reshape(len(signed), BANDS, -1)
    for row in range(len(signed)):
        earlier = np.flatnonzero(alive[:row])
        if dropped[row]:
            assert alive[row]
            assert agree[row, earlier].max() >= NEAR_HASHES
        elif alive[row]:
            kept = earlier[~dropped[:row][earlier]]
            for other in kept[agree[row, kept] >= NEAR_HASHES]:
                assert not (bands[row] == bands[other]).all(axis=1).any()
    assert 50 < dropped.sum() < 130


def test_four_fifths_of_a_signature_are_near(tmp_path: Path) -> None:
    """Each pair agrees in its first bands, and so is compared."""
    signed = []
    for pair, alike in enumerate((96, 95)):
        first = np.arange(HASHES, dtype=np.uint16) + 1000 * pair
        second = first.copy()
        second[alike:] += 500
        signed += [first, second]
    found = near_duplicates(store(tmp_path, signed, [4]), np.ones(4, bool), tmp_path / "bands", lambda done: None)
    assert HASHES == 120 and found.tolist() == [False, True, False, False]


def test_rows_are_found_in_their_files(tmp_path: Path) -> None:
    signed = [np.full(HASHES, number, np.uint16) for number in range(20)]
    signatures = store(tmp_path, signed, [3, 0, 10, 7])
    rows = np.array([19, 0, 3, 12, 13, 2, 2])
    assert signatures.at(rows)[:, 0].tolist() == rows.tolist()
    assert signatures.at(rows[:0]).shape == (0, HASHES)
    assert np.concatenate(list(signatures.blocks()))[:, 5].tolist() == list(range(20))


def test_a_corpus_loses_its_near_duplicates(tmp_path: Path) -> None:
    chance = random.Random(0)
    originals = [chance.choices(WORDS, k=300) for _ in range(40)]
    copies = [changed(words, 2, chance) for words in originals[:15]]
    texts = [" ".join(words) for words in [*originals, *copies, originals[20]]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    counts = {}
    for dedup in (Dedup.near, Dedup.exact, None):
        config = TextConfig(path=str(tmp_path / "a.jsonl"), val_fraction=0.1, dedup=dedup)
        corpus = TextSource(config, ContentHashes()).corpus(print, tmp_path / f"work{dedup}")
        counts[dedup] = corpus.counts
        if dedup is Dedup.near:
            assert [document.text for _, document in corpus.documents(0)] == texts[:40]
    assert counts == {
        Dedup.near: {"read": 56, "kept": 40, "duplicates": 1, "near_duplicates": 15},
        Dedup.exact: {"read": 56, "kept": 55, "duplicates": 1},
        None: {"read": 56, "kept": 56},
    }
