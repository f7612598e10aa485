"""What words mean that name runs: names and hashes, and what a shell's pattern finds beside runs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from llama_lab.cli import main
from llama_lab.config.errors import ConfigError
from llama_lab.lab.compare.records import load_records
from llama_lab.lab.patterns import without_asides
from llama_lab.lab.runs.listing import find_folders
from llama_lab.training.run_folder import find_run, named_run
from llama_lab.training.run_names import short_names

from .written_runs import Make

Output = pytest.CaptureFixture[str]


def test_a_run_may_be_named_by_its_name_or_its_hash(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = make(0), make(1)
    code = first.name[-8:]
    for word in (first.name, code, f"tiny/{first.name}", f"tiny/{code}"):
        assert named_run(Path(word)) == first
        assert find_folders([word]) == [first]
        assert [run.folder for run in load_records([word, second.name[-8:]])] == [first, second]
    for word in (code[:-1], code[1:], f"tinny/{code}", f"x/tiny/{code}", f"../{code}", "x" * 5000):
        assert named_run(Path(word)) == Path(word)
    monkeypatch.chdir(tmp_path)
    elsewhere = Path(shutil.copytree(second, tmp_path / code))
    assert find_run(Path(code)).path == elsewhere, "a path comes first"


def test_runs_may_be_named_by_what_they_are_called_together(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As `name=tiny` has made their folder, from wherever the command is typed."""
    runs = sorted([make(0), make(1)])
    assert find_folders(["tiny"]) == runs
    assert sorted(run.folder for run in load_records(["tiny"])) == runs
    monkeypatch.chdir(tmp_path)
    (elsewhere := tmp_path / "tiny").mkdir()
    shutil.copytree(runs[0], elsewhere / runs[0].name)
    assert find_folders(["tiny"]) == [elsewhere / runs[0].name], "a path comes first"


@pytest.mark.parametrize("command", ["runs", "compare", "serve", "watch", "evaluate", "generate", "verify", "train"])
def test_a_text_in_the_place_of_a_path_is_answered(outputs: Path, capsys: Output, command: str):
    assert main([command, "Once upon a time " * 20]) == 2
    said = capsys.readouterr().err
    assert re.search(
        f"is too long to name anything; llama-lab {command} --help|is no run, and RUN is missing|name a run's folder", said
    )


def test_a_name_of_several_runs_names_them_all(make: Make, outputs: Path, capsys: Output):
    first = make(0)
    code = first.name[-8:]
    repeat = Path(shutil.copytree(first, first.with_name(f"smoke-repeat-1-{code}")))
    other = Path(shutil.copytree(first, outputs / "other" / first.name))
    with pytest.raises(ConfigError, match=r"is what 3 runs are called; name one of them: ") as refused:
        find_run(Path(code))
    assert all(str(run) in str(refused.value) for run in (first, repeat, other))
    with pytest.raises(ConfigError, match=r"is what 2 runs are called"):
        find_run(Path(first.name))
    for words in (["runs"], ["serve"], ["track"], ["compare"], ["verify"], ["data", "inspect"], ["generate"], ["evaluate"]):
        assert main([*words, code]) == 2
        assert f"{code} is what 3 runs are called" in capsys.readouterr().err
    runs = [first, repeat, other]
    assert [named_run(Path(name)) for name in short_names(runs)] == runs


def test_short_names_are_hashes_and_longer_only_where_two_have_one(make: Make, outputs: Path):
    first, second = make(0), make(1)
    code, another = first.name[-8:], second.name[-8:]
    assert short_names([first, second]) == [code, another]
    aside = Path(shutil.copytree(first, first.with_name(f"{first.name}.1")))
    assert short_names([first, aside]) == [code, f"{code}.1"]
    assert named_run(Path(f"{code}.1")) == aside
    other = Path(shutil.copytree(second, outputs / "other" / second.name))
    assert short_names([second, other]) == [f"tiny/{another}", f"other/{another}"]
    repeat = Path(shutil.copytree(first, first.with_name(f"tiny-repeat-1-{code}")))
    assert short_names([repeat]) == [f"1-{code}"]
    nameless = Path(shutil.copytree(first, first.with_name("nameless")))
    assert short_names([nameless]) == ["nameless"]


def test_a_damaged_run_is_found_by_its_hash_and_what_is_wrong_is_said(make: Make, capsys: Output):
    folder = make(0)
    (folder / "config.yaml").unlink()
    for word in (folder.name[-8:], str(folder)):
        assert main(["runs", word]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert f"{folder} has no config.yaml" in shown.err


def test_what_lies_beside_runs_is_left_out_where_a_shell_has_named_it(make: Make, outputs: Path, capsys: Output):
    runs = [make(0), make(0, lr=2e-3)]
    named = sorted(map(str, runs))
    study = outputs / "tiny"
    for name in ("sweeps/init-12345678", "report"):
        (study / name).mkdir(parents=True)
    assert without_asides(sorted(map(str, study.iterdir()))) == named
    aside = Path(shutil.copytree(runs[0], runs[0].with_name(f"{runs[0].name}.1")))
    everything = sorted(map(str, study.iterdir()))
    assert without_asides(["--unpaired=x", *everything, "--metric", "x"]) == ["--unpaired=x", *named, "--metric", "x"]
    # Typed, and not found.
    for typed in ([str(runs[0]), str(aside)], [str(study / "report")], ["--out", str(study / "report"), *named]):
        assert without_asides(typed) == typed
    # A study may be called so.
    called = Path(shutil.copytree(study, outputs / "report"))
    assert without_asides([str(called), str(study)]) == [str(called), str(study)]
    shutil.rmtree(called)
    for command in ("compare", "runs", "diff", "watch"):
        assert main([command, *everything]) == 0
    capsys.readouterr()
    assert main(["runs", *everything, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert main(["report", *everything, "--out", str(study / "report")]) == 0
    assert main(["serve", *everything]) == 2
    assert "put checkpoints/ back" in capsys.readouterr().err, "and not that a folder holds no run"
