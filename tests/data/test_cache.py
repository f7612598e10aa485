"""The cache folder: where it is, and the command that lists and cleans it."""

import os
import sys
import time
from pathlib import Path

import pytest

from llama_lab.config.schema import BytesConfig, TextConfig
from llama_lab.data import cache
from llama_lab.data.cache import cache_root, entries, entry_lock, prepared_root, run_cache_command
from llama_lab.data.prepare import prepare


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    """Two entries, the first last used ten days ago, and the draft of a process that was killed."""
    found = []
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"text number {number} " * 50)
        found.append(prepare(TextConfig(path=str(tmp_path / f"{number}.txt"), val_fraction=0.1), BytesConfig()).folder)
    past = time.time() - 10 * 86_400
    os.utime(found[0] / "last_used", (past, past))
    draft = prepared_root() / f".{found[0].name}.partial"
    draft.mkdir()
    (draft / "train-00000.bin").write_bytes(b"x" * 2500)
    return [path.name for path in found]


def left() -> set[str]:
    return {entry.name for entry in entries()}


def test_list_shows_name_size_kind_and_last_use(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_cache_command([]) == run_cache_command(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(str(cache_root()))
    newest = next(line for line in lines if line.startswith(f"  {names[1]}"))
    assert "text, bytes" in newest
    assert time.strftime("%Y-%m-%d") in newest
    assert any("2.5 kB  unfinished" in line for line in lines)
    assert lines[-1].startswith("3 entries, ")


def test_an_empty_cache_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cache_command(["list"]) == 0
    assert "0 entries, 0 B" in capsys.readouterr().out


def test_clean_alone_removes_what_is_unfinished(names: list[str]) -> None:
    assert run_cache_command(["clean"]) == 0
    assert left() == set(names)


def test_clean_removes_by_name_by_age_and_all(names: list[str]) -> None:
    assert run_cache_command(["clean", "--older-than", "5"]) == 0
    assert names[0] not in left()
    assert run_cache_command(["clean", names[1]]) == 0
    assert names[1] not in left()
    assert run_cache_command(["clean", "--all"]) == 0
    assert left() == set()


def test_what_is_being_made_stays(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with entry_lock(names[0]):
        assert run_cache_command(["clean", "--all"]) == 1
    assert names[0] in left()
    assert f"{names[0]} is in use" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be removed there")
def test_what_a_run_reads_stays(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with cache.in_use(cache.prepared_root() / names[0]), cache.in_use(cache.prepared_root() / names[0]):
        assert run_cache_command(["clean", "--older-than", "0"]) == 1
    assert left() == {names[0]}
    assert f"{names[0]} is in use" in capsys.readouterr().err
    assert run_cache_command(["clean", "--all"]) == 0
    assert left() == set()


def test_an_unknown_entry_is_named(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cache_command(["clean", "nope"]) == 2
    assert names[1] in capsys.readouterr().err
    assert run_cache_command(["bogus"]) == 2
    assert run_cache_command(["--help"]) == 0


def test_using_an_entry_notes_the_time(names: list[str], tmp_path: Path) -> None:
    assert entries()[0].name != names[0]
    prepare(TextConfig(path=str(tmp_path / "0.txt"), val_fraction=0.1), BytesConfig())
    assert next(entry for entry in entries() if entry.name == names[0]).used > time.time() - 60


def test_the_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "x"))
    assert cache.cache_root() == tmp_path / "x"
    monkeypatch.setenv("LLAMA_LAB_CACHE", "")
    assert cache.cache_root().name == "llama_lab"
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache.cache_root() == tmp_path / "llama_lab"
