"""A user's own files: which are read, how they are split, and what is said about broken ones."""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import TextConfig
from llama_lab.data.cache import ContentHashes, entries, in_use
from llama_lab.data.corpus import Corpus, Side
from llama_lab.data.text import TextSource, find_files


def source(path: Path, val_fraction: float = 0.1) -> TextSource:
    return TextSource(TextConfig(path=str(path), val_fraction=val_fraction), ContentHashes())


def read(path: Path, val_fraction: float = 0.1) -> Corpus:
    return source(path, val_fraction).corpus(print, Path(tempfile.mkdtemp(dir=path.parent)))


def texts(corpus: Corpus) -> tuple[list[str], list[str]]:
    return [document.text for document in corpus.side(Side.train)], [document.text for document in corpus.side(Side.val)]


def refusal(path: Path, val_fraction: float = 0.1) -> str:
    with pytest.raises(ConfigError) as error:
        read(path, val_fraction)
    return str(error.value)


def write_lines(path: Path, objects: list[object]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in objects), encoding="utf-8")
    return path


def test_the_last_tenth_of_one_file_is_validation(tmp_path: Path) -> None:
    raw = random.Random(0).randbytes(1_115_394).translate(bytes(range(32, 127)) * 2 + bytes(range(32, 98)))
    (tmp_path / "one.txt").write_bytes(raw)
    train, val = texts(read(tmp_path / "one.txt"))
    assert [text.encode() for text in val] == [raw[1_003_854:]]
    assert [text.encode() for text in train] == [raw[:1_003_854]]


def test_the_cut_falls_between_characters_and_may_pass_through_several_documents(tmp_path: Path) -> None:
    for number, text in enumerate(["α" * 50, "βγ" * 50, "𝄞" * 25]):
        (tmp_path / f"{number}.md").write_text(text, encoding="utf-8")
    for fraction in (0.1, 0.3333, 0.5, 0.9):
        train, val = texts(read(tmp_path, fraction))
        assert "".join(train + val) == "α" * 50 + "βγ" * 50 + "𝄞" * 25
        size = len("".join(val).encode())
        assert 400 * fraction <= size < 400 * fraction + 4


def test_line_ends_and_white_space_stay_and_a_byte_order_mark_goes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf  one\r\ntwo\n\n three \n")
    train, val = texts(read(tmp_path / "a.txt", 0.2))
    assert "".join(train + val) == "  one\r\ntwo\n\n three \n"


def test_windows_line_ends_are_said(tmp_path: Path) -> None:
    said: list[str] = []

    def read_all() -> str:
        said.clear()
        source(folder).corpus(said.append, Path(tempfile.mkdtemp(dir=tmp_path)))
        return " ".join(line for line in said if "Windows" in line)

    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"one\ntwo\n" * 100)
    assert read_all() == ""
    (folder / "b.txt").write_bytes(b"eins\r\nzwei\r\n" * 100)
    path = folder / "b.txt"
    rule = r"and the model learns that; data.unix_line_ends=true reads \n instead"
    assert read_all() == rf"{path} ends its lines with \r\n, as Windows does, {rule}"
    (folder / "c.md").write_bytes(b"drei\r\nvier\r\n" * 100)
    assert read_all().startswith(rf"{path} and others end their lines with \r\n")


def test_unix_line_ends_are_what_is_trained_on_and_known_by(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n\r\n" * 20)
    write_lines(tmp_path / "b.jsonl", [{"text": "four\r\nfive"}])
    said: list[str] = []
    unix = TextSource(TextConfig(path=str(tmp_path), val_fraction=0.1, unix_line_ends=True), ContentHashes())
    assert unix.fingerprint() != source(tmp_path).fingerprint()
    corpus = unix.corpus(said.append, Path(tempfile.mkdtemp(dir=tmp_path)))
    assert "".join(document.text for _, document in corpus.documents(0)) == "one\ntwo\nthree\n\n" * 20 + "four\nfive"
    assert corpus.text_bytes == 15 * 20 + 9
    assert "Windows" not in " ".join(said)


def test_from_twenty_documents_on_they_are_held_out_by_hash(tmp_path: Path) -> None:
    objects: list[object] = [{"text": f"document number {number}", "id": number} for number in range(1000)]
    train, val = texts(read(write_lines(tmp_path / "a.jsonl", objects)))
    assert 70 <= len(val) <= 130
    assert sorted(train + val) == sorted(f"document number {number}" for number in range(1000))
    # More documents, in another order, leave each on its side.
    more = [*objects, *({"text": f"new {number}"} for number in range(100))]
    random.Random(1).shuffle(more)
    new_train, new_val = texts(read(write_lines(tmp_path / "b.jsonl", more)))
    assert set(train) <= set(new_train)
    assert set(val) <= set(new_val)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_no_side_is_ever_empty(tmp_path: Path, fraction: float) -> None:
    train, val = texts(read(write_lines(tmp_path / "a.jsonl", [{"text": f"number {number}"} for number in range(20)]), fraction))
    assert min(len(train), len(val)) == 1


def test_repeated_and_empty_documents_are_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"text": f"number {number % 30}" + " " * (number // 30)} for number in range(60)] + [{"text": " \n"}, {"text": ""}]
    train, val = texts(read(write_lines(tmp_path / "a.jsonl", lines)))
    assert sorted(train + val) == sorted(f"number {number}" for number in range(30))
    assert "30 documents" in capsys.readouterr().out


def test_folders_are_searched_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/two.MD", "a/one.txt", "c.jsonl", ".hidden/x.txt", ".x.txt", "d.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name, encoding="utf-8")
    train, val = texts(read(tmp_path, 0.01))
    assert "".join(train + val) == "a/one.txtb/two.MDc.jsonl"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("*/*.jsonl*", ["b/c.jsonl.gz"]),
        ("**/*.jsonl*", ["a.jsonl", "b/c.jsonl.gz"]),
        ("b*", ["b.txt", "b/c.jsonl.gz", "b/d/e.md"]),
        ("[ab].*", ["a.jsonl", "b.txt"]),
        ("b/**", ["c.jsonl.gz", "d/e.md"]),
    ],
)
def test_patterns_match_files_and_folders(tmp_path: Path, pattern: str, names: list[str]) -> None:
    for name in ("a.jsonl", "b.txt", "b/c.jsonl.gz", "b/d/e.md", "b/.f.md", ".b/g.txt", "b/h.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(gzip.compress(b'{"text": "packed"}') if name.endswith(".gz") else b'{"text": "plain"}')
    assert [file.name for file in find_files(f"{tmp_path}/{pattern}")] == names


links = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Files beside a folder and in it, behind links that also lead to each other, to a hidden one, up, and nowhere."""
    for name in ("own/z/real.txt", "own/.hidden/h.txt", "disk/books/b.txt", "disk/books/deep/d.txt", "disk/more.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text('{"text": "one"}', encoding="utf-8")
    for name, target in {
        "own/books": "../disk/books",
        "own/a_second_way": "../disk/books",
        "own/a_third_way": "z",
        "own/disk": "../disk",
        "own/z/up": "..",
        "own/.away": "../disk",
        "own/hidden": ".hidden",
        "own/gone": "../nowhere",
        "disk/books/deep/again": "../../../own",
    }.items():
        (tmp_path / name).symlink_to(target, target_is_directory=True)
    return tmp_path / "own"


@links
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a_second_way/b.txt", "a_second_way/deep/d.txt", "disk/more.jsonl", "hidden/h.txt", "z/real.txt"]),
        ("**/*.txt", ["a_second_way/b.txt", "a_second_way/deep/d.txt", "hidden/h.txt", "z/real.txt"]),
        ("**/deep/*.txt", ["a_second_way/deep/d.txt"]),
        (
            "**/deep/*",
            [
                "a_second_way/deep/again/a_second_way/b.txt",
                "a_second_way/deep/again/disk/more.jsonl",
                "a_second_way/deep/again/hidden/h.txt",
                "a_second_way/deep/again/z/real.txt",
                "a_second_way/deep/d.txt",
            ],
        ),
        ("*/**", ["a_second_way/b.txt", "a_second_way/deep/d.txt", "disk/more.jsonl", "hidden/h.txt", "z/real.txt"]),
        ("[bd]*/*.*", ["books/b.txt", "disk/more.jsonl"]),
    ],
)
def test_links_to_folders_are_followed_and_each_folder_is_read_once(linked: Path, pattern: str, names: list[str]) -> None:
    assert [file.name for file in find_files(f"{linked}/{pattern}")] == names


@links
def test_a_link_to_a_folder_changes_no_name_of_what_was_there(linked: Path) -> None:
    before = [file.name for file in find_files(str(linked))]
    (linked / "0_first").symlink_to("z", target_is_directory=True)
    assert [file.name for file in find_files(str(linked))] == before
    (linked / "z" / "up").unlink()
    (linked / "z" / "up").symlink_to(linked, target_is_directory=True)
    assert [file.name for file in find_files(str(linked))] == before


def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("text")
    assert [file.name for file in find_files(str(tmp_path / "a[1].txt"))] == ["a[1].txt"]


@pytest.mark.parametrize(("pattern", "rule"), [("*.jsonl", "matches nothing in"), ("*.py", "matches no .txt, .md, .jsonl")])
def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path, pattern: str, rule: str) -> None:
    (tmp_path / "a.py").write_text("text")
    with pytest.raises(ConfigError) as error:
        find_files(f"{tmp_path}/{pattern}")
    assert f"data.path={tmp_path}/{pattern} {rule}" in str(error.value)


def from_standard_input(given: bytes, ending: str = "") -> str:
    """What a process that reads `data.path=-` finds there, twice, having begun to prepare it.

    Args:
        ending: what it does then, on `source`.
    """
    program = (
        "from llama_lab.config.errors import ConfigError\n"
        "from llama_lab.config.schema import TextConfig\n"
        "from llama_lab.data.cache import ContentHashes\n"
        "from llama_lab.data.text import TextSource, find_files\n"
        "from pathlib import Path\n"
        "from tempfile import mkdtemp\n"
        "try:\n"
        "    assert find_files('-') == find_files('-')\n"
        "    print(find_files('-')[0].path)\n"
        "    source = TextSource(TextConfig(path='-', val_fraction=0.1), ContentHashes())\n"
        "    source.fingerprint()\n"
        "    source.corpus(lambda said: None, Path(mkdtemp()))\n"
        f"    {ending}\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], input=given, capture_output=True, timeout=170, cwd=root)
    assert done.stderr == b""
    return done.stdout.decode().strip()


def test_the_standard_input_is_kept_under_its_content(cache_folder: Path) -> None:
    lines = b'\n{"text": "one"}\n{"text": "two"}\n'
    first = Path(from_standard_input(lines))
    assert (first.name, first.read_bytes()) == ("input.jsonl", lines)
    written = first.stat().st_mtime_ns
    assert Path(from_standard_input(lines)) == first
    assert first.stat().st_mtime_ns == written
    other = Path(from_standard_input(b"some text"))
    assert (other.name, other.read_bytes()) == ("input.txt", b"some text")
    assert cache_folder in other.parents
    assert {entry.kind for entry in entries()} == {"unfinished"}  # so that `llama-lab cache clean` removes them
    assert "data.path=- reads the standard input, which is empty" in from_standard_input(b" \n")
    assert len(entries()) == 2


def test_the_standard_input_goes_when_it_is_prepared_or_cannot_be(cache_folder: Path) -> None:
    assert not Path(from_standard_input(b"some text", ending="source.check_unchanged()")).exists()
    said = from_standard_input(b'{"text": 5}')
    assert "has a number as `text`" in said and not Path(said.splitlines()[0]).exists()
    kept = Path(from_standard_input(b"some text"))
    assert kept.exists()
    with in_use(kept.parent):
        assert Path(from_standard_input(b"some text", ending="source.check_unchanged()")) == kept
        assert kept.exists(), "another process reads it"
    assert Path(from_standard_input(b"some text", ending="source.check_unchanged()")) == kept
    assert not kept.exists() and entries() == []


def test_a_wrong_field_is_said_once_with_what_to_type(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"id": "1", "body": "some text"}] * 30)
    message = refusal(path)
    assert message.startswith("1 problem in the data")
    assert f"{path}:1 has no `text`; it has body, id. Name the one that holds the text, for example data.text_field=body" in message
    assert "(so it is in at least 9 more places); data.on_error=skip" in message
    write_lines(path, [{"id": "1", "body": "some text"}] * 2)
    assert "(so it is in 1 more place); " in refusal(path)
    write_lines(path, [{"my body": "some text"}])
    assert "it has my body. Name the one that holds the text with data.text_field=…; data.on_error" in refusal(path)


def test_every_broken_line_is_named_with_its_reason(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b"",
        b"[1]",
        b'{"body": 1}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    message = refusal(tmp_path)
    assert message.startswith("6 problems in the data")
    for line in (
        f"{path}:2 is no JSON object: Expecting property name enclosed in double quotes at column 2",
        f"{path}:4 is a JSON list, not an object with a `text` string",
        f"{path}:5 has no `text`; it has body.",
        f"{path}:6 has a number as `text`; it must be a string",
        f"{path}:7 is not UTF-8: byte 0xff at offset 10",
        f"{path}:8 holds half a surrogate pair",
    ):
        assert line in message


def test_what_is_no_text_is_not_to_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    chance = random.Random(0)
    for raw in (chance.randbytes(100_000), bytes(chance.randint(1, 255) for _ in range(2000)), b"\x7fELF\x00\xff" + b"a" * 1000):
        path.write_bytes(raw)
        assert (said := refusal(path)) and f"{path} does not look like text: " in said and "iconv" not in said
    path.write_bytes("\tGrüße\f\r\n".encode("latin1") * 100)
    assert "iconv -f LATIN1 -t UTF-8" in refusal(path)


def test_a_text_that_was_cut_off_is_not_to_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße, schön".encode()[:-2])
    assert f"{path} ends in the middle of a character, at offset 12; copy all of it" in refusal(path)
    path.write_bytes("a café".encode("latin1"))
    assert "iconv -f LATIN1 -t UTF-8" in refusal(path)


def test_an_address_is_no_path() -> None:
    with pytest.raises(ConfigError, match="is an address; fetch it, for example with curl"):
        find_files("https://a.org/b.txt")


def test_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße".encode("utf-16"))
    assert f"{path} is not UTF-8: byte 0xff at offset 0; convert it, for example with iconv -f UTF-16 -t UTF-8" in refusal(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist: there is no there in "),
        (lambda path: path.mkdir(), "holds no .txt, .md, .jsonl (each also .gz, .xz or .zst) or .parquet file"),
        (lambda path: path.write_text("x"), "is a file without suffix; use .txt, .md, .jsonl"),
    ],
)
def test_a_path_with_nothing_to_read_is_named(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "there")
    assert f"data.path={tmp_path / 'there'} {message}" in refusal(tmp_path / "there")


def test_too_little_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    assert "holds no text" in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert "data.val_fraction=0.1 leaves nothing to train on of 1 bytes of text" in refusal(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything is readable to root and under Windows")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        source(tmp_path).fingerprint()


def test_the_fingerprint_follows_content_and_not_place_or_date(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("the same")
    second.write_text("the same")
    os.utime(second, (1, 1))
    assert source(first).fingerprint() == source(second).fingerprint()
    assert source(first).fingerprint() != source(first, 0.2).fingerprint()
    second.write_text("the sane")
    assert source(first).fingerprint() != source(second).fingerprint()


def test_hashes_of_large_files_are_remembered_until_they_change(tmp_path: Path, cache_folder: Path) -> None:
    cache_folder.mkdir()
    path = tmp_path / "large.txt"
    path.write_bytes(b"a" * 16_000_000)
    os.utime(path, (1000, 1000))
    first = ContentHashes().of(path)
    assert (cache_folder / "content-hashes.json").exists()
    assert ContentHashes().of(path) == first
    path.write_bytes(b"b" * 16_000_000)
    assert ContentHashes().of(path) != first


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"number {number}"} for number in range(30)])
    found = source(path)
    found.fingerprint()
    corpus = found.corpus(print, tmp_path / "scan")
    write_lines(path, [{"text": "other"}])
    with pytest.raises(ConfigError, match="changed while it was being read; run the command again"):
        list(corpus.side(Side.train))
    with pytest.raises(ConfigError, match="changed while it was being read"):
        found.check_unchanged()
