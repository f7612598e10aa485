"""Files as items: every form and compression, second readings of some items, long texts, and what is broken."""

import gzip
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_lab.data import reading
from llama_lab.data.reading import Item, TextFile, form_of, read_items, zstd

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: zstd("a test").compress(raw),
}
TEXTS = ["one", "zwei\nZeilen: Größe", "𝄞 " * 500, "  white space stays \r\n", "{}"]


def items(path: Path, separator: str | None = None, wanted: np.ndarray | None = None) -> list[Item]:
    return list(read_items(TextFile(path, path.name), "text", separator, wanted))


def write_table(path: Path, texts: list[str | None], rows: int = 100, field: str = "text") -> Path:
    columns = {field: pa.array(texts, pa.string()), "id": list(range(len(texts)))}
    pq.write_table(pa.table(columns), path, row_group_size=rows, compression="snappy", use_dictionary=False)
    return path


def write_lines(path: Path, texts: list[str]) -> Path:
    raw = "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(PACK["." + path.name.split(".")[2] if path.name.count(".") == 2 else ""](raw))
    return path


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_lines_are_the_lines(tmp_path: Path, suffix: str) -> None:
    found = items(write_lines(tmp_path / f"a.jsonl{suffix}", TEXTS))
    assert [item.text for item in found] == TEXTS
    assert [(item.index, item.number, item.problem) for item in found] == [(n, n + 1, None) for n in range(5)]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("form", [".txt", ".MD"])
def test_a_text_file_is_one_item(tmp_path: Path, form: str, suffix: str) -> None:
    path = tmp_path / f"a{form}{suffix}"
    path.write_bytes(PACK[suffix](b"\xef\xbb\xbf" + TEXTS[1].encode()))
    assert items(path) == [Item(0, 0, TEXTS[1])]


def test_rows_of_a_table_are_items(tmp_path: Path) -> None:
    texts = [f"{number} {'word ' * (number % 50)}" for number in range(1300)]
    found = items(write_table(tmp_path / "a.parquet", texts, rows=500))
    assert [item.text for item in found] == texts
    assert [item.number for item in found] == list(range(1, 1301))


def test_forms_are_known_by_name() -> None:
    names = ["a.txt", "a.MD.gz", "a.jsonl.zst", "a.parquet", "a.parquet.gz", "a.py", "a", "a.gz", "a.json"]
    assert [form_of(Path(name)) for name in names] == ["text", "text", "lines", "table", None, None, None, None, None]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
def test_a_second_reading_gives_the_items_that_are_wanted(tmp_path: Path, name: str) -> None:
    chance = random.Random(name)
    texts = [f"text {number} {'x' * chance.randint(0, 300)}\n" for number in range(700)]
    path = tmp_path / name
    if name.endswith(".parquet"):
        write_table(path, texts, rows=64)
    elif name.endswith(".txt"):
        path.write_text("---\n".join(texts))
    else:
        write_lines(path, texts)
    found = items(path, "---")
    assert [item.text for item in found] == texts
    for share in (0.0, 0.01, 0.5, 1.0):
        wanted = np.array([chance.random() < share for _ in texts])
        assert items(path, "---", wanted) == [item for item in found if wanted[item.index]]
        assert items(path, "---", wanted[:300]) == [item for item in found[:300] if wanted[item.index]]


def test_separator_lines_part_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo <|endoftext|> three\n<|endoftext|>\nfour\r\n  <|endoftext|> \r\n<|endoftext|>five\n<|endoftext|>")
    found = items(path, "<|endoftext|>")
    assert [item.text for item in found] == ["one\ntwo <|endoftext|> three\n", "four\r\n", "<|endoftext|>five\n"]
    assert [item.number for item in found] == [1, 2, 3]


def test_separators_are_found_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    for trial in range(60):
        monkeypatch.setattr(reading, "BLOCK_BYTES", chance.choice([1, 2, 7, 64]))
        monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 400)
        texts = ["".join(chance.choices("ab #\n", k=chance.randint(0, 150))).replace("##", "a") + "\n" for _ in range(20)]
        path = tmp_path / f"{trial}.txt"
        path.write_text("##\n".join(texts), newline="")
        assert [item.text for item in items(path, "##")] == texts


def test_a_long_text_is_cut_where_it_hurts_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 1000)
    path = tmp_path / "a.txt"
    lines, words, nothing = ("word " * 30 + "\n") * 20, "größe " * 400, "𝄞" * 900
    path.write_text(lines + words + "\n" + nothing, encoding="utf-8", newline="")
    found = items(path)
    assert "".join(item.text for item in found) == lines + words + "\n" + nothing
    assert [item.number for item in found] == list(range(1, len(found) + 1))
    assert max(len(item.text.encode()) for item in found) <= 1000
    assert all(item.text.endswith("\n") and item.text.startswith("word") for item in found[:3])
    assert found[5].text.startswith(" größe")
    assert min(len(item.text.encode()) for item in found[:-1] if set(item.text) == {"𝄞"}) == 1000


def test_a_text_of_just_the_limit_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("x" * 1000)
    assert items(tmp_path / "a.txt") == [Item(0, 0, "x" * 1000)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_huge_text_is_read_in_little_memory(tmp_path: Path, name: str) -> None:
    line = b"a line of a book that goes on and on\n"
    raw = line * (100_000_000 // len(line))
    (tmp_path / name).write_bytes(gzip.compress(raw, 1) if name.endswith(".gz") else raw)
    size = len(raw)
    del raw
    tracemalloc.start()
    try:
        assert sum(len(item.text) for item in read_items(TextFile(tmp_path / name, name), "text", None)) == size
        assert tracemalloc.get_traced_memory()[1] < 45_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_compressed_file_that_breaks_off_keeps_the_lines_before(tmp_path: Path, suffix: str) -> None:
    chance = random.Random(0)
    texts = ["".join(chance.choices("abcdefgh", k=1000)) for _ in range(2000)]
    path = write_lines(tmp_path / f"a.jsonl{suffix}", texts)
    path.write_bytes(path.read_bytes()[:-40_000])
    *good, broken = items(path)
    assert [item.text for item in good] == texts[: len(good)]
    assert len(good) > 1000
    assert broken.problem is not None
    assert broken.problem[0] == f"{path}:{len(good) + 1}"
    assert broken.problem[1].startswith("cannot be decompressed from here on: Compressed file ended before")
    # A second reading that wants the good ones meets no problem.
    wanted = np.array([True] * len(good) + [False])
    assert items(path, wanted=wanted) == good


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_file_that_is_not_compressed_as_its_name_says(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_text("plain text")
    ((item),) = items(path)
    assert item.problem is not None
    assert item.problem[0] == str(path)
    assert "cannot be decompressed" in item.problem[1]


def test_a_broken_row_group_is_named_and_the_others_stay(tmp_path: Path) -> None:
    chance = random.Random(0)
    texts: list[str | None] = ["".join(chance.choices("abcdefgh", k=100)) for _ in range(1000)]
    path = write_table(tmp_path / "a.parquet", texts, rows=250)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    raw[column.data_page_offset : column.data_page_offset + 400] = b"\xff" * 400
    path.write_bytes(raw)
    found = items(path)
    (broken,) = [item for item in found if item.problem is not None]
    assert (broken.index, broken.count) == (250, 250)
    assert broken.problem is not None
    assert broken.problem[0] == f"{path} row group 2"
    assert "cannot be read from row 251 to 500: " in broken.problem[1]
    assert [item.text for item in found if item.problem is None] == texts[:250] + texts[500:]
    wanted = np.array([True] * 250 + [False] * 250 + [True] * 500)
    assert [item.text for item in items(path, wanted=wanted)] == texts[:250] + texts[500:]


def test_tables_of_another_shape_are_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", ["a", "b"], field="content")
    ((item),) = items(path)
    rule = "has no column `text`; it has content, id. Name the one that holds the text, for example data.text_field=content"
    assert (item.problem, item.count) == ((str(path), rule), 2)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert items(path)[0].problem == (str(path), "has int64 values in the column `text`; they must be strings")
    path.write_bytes(b"no table at all")
    problem = items(path)[0].problem
    assert problem is not None
    assert problem[1].startswith("is no Parquet file that can be read: ")
    write_table(path, ["a", None, "c"])
    assert items(path)[1].problem == (f"{path} row 2", "has a null as `text`; it must be a string")


def test_dictionaries_and_large_strings_are_text(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}), tmp_path / "a.parquet")
        assert [item.text for item in items(tmp_path / "a.parquet")] == ["a", "b", "a"]


def test_a_wrong_byte_is_named_by_its_place_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 99 + b"\n" + b"y" * 50 + b"\xff" + b"\n" + b"z" * 99)
    good, broken, last = items(path)
    assert (good.problem, last.problem) == (None, None)
    assert broken.problem is not None
    assert broken.problem[0] == f"{path} part 2"
    assert broken.problem[1].startswith("is not UTF-8: byte 0xff at offset 150; ")
