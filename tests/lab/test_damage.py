"""Damaged checkpoints: every command says the same of them, and what can be typed instead."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_lab import compose, load, train
from llama_lab.cli import main
from llama_lab.config.errors import ConfigError

from ..training.conftest import tiny_overrides

ALTERED = "is not what was saved (its checksum differs)"
ANEW = "no checkpoint of this run is whole: the command that trained it, with fresh=true, moves it aside and starts anew"


def damage(path: Path) -> None:
    path.write_bytes(b"x" + path.read_bytes()[1:])


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in a folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_LAB_OUTPUTS", str(tmp_path_factory.mktemp("whole")))
        return train(compose(tiny_overrides(text))).folder


@pytest.fixture
def run(trained: Path, outputs: Path) -> Path:
    """It, in this test's folder, where it may be damaged."""
    return Path(shutil.copytree(trained, outputs / "tiny" / trained.name))


@pytest.fixture
def said(run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str]]:
    """What a command says of the run, and its exit code."""
    words = {
        "train": tiny_overrides(text),
        "fork": [str(run), "training_tokens=20480"],
        "generate": [str(run), "the", "--max-new-tokens", "2", "--device", "cpu"],
        "evaluate": [str(run), "--device", "cpu"],
        "export": [str(run), "--to", "hf", "--out", str(tmp_path / "out")],
    }

    def ask(command: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main([command, *words[command]])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return ask


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_named_by_every_command_with_a_whole_one(run, said, name):
    newest = max((run / "checkpoints").glob("tokens-*")) / name
    damage(newest) if name == "model.safetensors" else newest.unlink()
    told = f"{newest} {ALTERED if newest.exists() else 'is missing'}; the newest whole checkpoint is --update 16\n"
    code, text = said("train")
    assert code == 0
    assert f"  damaged: {told}" in text
    assert f"to train it further: llama-lab fork {run} --update 8 training_tokens=20480\n" in text
    for command in ("fork", "generate", "evaluate", "export"):
        code, text = said(command)
        assert (code, text.splitlines(keepends=True)[-1]) == (2, f"  {told}"), command
    with pytest.raises(ConfigError, match="the newest whole checkpoint is update=16"):
        load(run)
    assert load(run, 16).update == 16


def test_where_no_checkpoint_is_whole_every_command_says_how_to_begin_anew(run, said):
    files = sorted(run.glob("checkpoints/*/model.safetensors"))
    for file in files:
        damage(file)
    code, text = said("train")
    assert (code, f"  damaged: {files[-1]} {ALTERED}; {ANEW}\n" in text, "train it further" in text) == (0, True, False)
    for command in ("fork", "generate", "evaluate", "export"):
        code, text = said(command)
        assert (code, text.splitlines()[-1]) == (2, f"  {files[-1]} {ALTERED}; {ANEW}"), command


def test_what_needs_weights_alone_is_not_stopped_by_a_damaged_state(run, said):
    state = max((run / "checkpoints").glob("tokens-*")) / "state.safetensors"
    damage(state)
    assert [said(command)[0] for command in ("generate", "evaluate", "export")] == [0, 0, 0]
    code, text = said("fork")
    assert (code, text.splitlines()[-1]) == (2, f"  {state} {ALTERED}; the newest whole checkpoint is --update 16")


def test_an_update_whose_checkpoint_lost_its_manifest_says_so(run):
    (missing,) = run.glob("checkpoints/tokens-000000000004096/manifest.json")
    missing.unlink()
    with pytest.raises(ConfigError) as caught:
        load(run, 8)
    assert str(caught.value).endswith(f"  update=8 is no checkpoint of {run}; there are 4, 12, 16, 20; {missing} is missing")


def test_what_is_no_run_says_what_to_name(run, outputs, tmp_path):
    def refusal(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load(path)
        return str(caught.value).splitlines()[1]

    instead = "name a run's folder, outputs/<name>/<run id>"
    assert refusal(outputs / "tiny") == f"  {outputs / 'tiny'} holds no run itself; runs in it: {run}"
    assert refusal(outputs) == f"  {outputs} holds no run itself; runs in it: {run}"
    assert refusal(run / "meta.json") == f"  {run / 'meta.json'} is a file; {instead}"
    for typed in (run.with_name(run.name[:-3]), outputs / "tny" / run.name, tmp_path / run.name):
        assert refusal(typed) == f"  {typed} does not exist; did you mean {run}?"
    assert refusal(tmp_path / "nosuch") == f"  {tmp_path / 'nosuch'} does not exist; {instead}"


def test_a_finished_run_without_checkpoints_says_how_to_begin_anew(run, said):
    """Not that it was to be trained further: `train` says that it is finished."""
    meta = json.loads((run / "meta.json").read_text())
    shutil.rmtree(run / "checkpoints")
    gone = f"{run} is finished, and its checkpoints are gone; put checkpoints/ back from a copy, or "
    anew = "the command that trained it, with fresh=true, moves it aside and starts anew"
    remedies = {"fork somewhere": anew, "train -m seed.init=1,2": anew, "": anew}
    remedies["train n=a|b fresh=false"] = "llama-lab train 'n=a|b' fresh=true moves it aside and trains it anew"
    for typed, remedy in remedies.items():
        command = ["llama-lab", *typed.split()] if typed else None
        (run / "meta.json").write_text(json.dumps(meta | {"command": command}))
        for asked in ("fork", "generate", "evaluate", "export"):
            code, text = said(asked)
            assert (code, text.splitlines()[-1]) == (2, f"  {gone}{remedy}"), asked


def test_a_run_without_its_tokenizer_names_a_copy_of_it(run, said, tmp_path, monkeypatch):
    kept = (run / "tokenizer.json").read_bytes()
    (run / "tokenizer.json").unlink()
    missing = f"  {run / 'tokenizer.json'} is missing, and ids mean nothing without it; "
    for command in ("generate", "evaluate"):
        code, text = said(command)
        line = text.splitlines()[-1]
        assert code == 2 and line.startswith(f"{missing}its data has a copy: cp ") and line.endswith("with fresh=true"), command
    copy = Path(line.partition(": cp ")[2].split()[0])
    assert copy.read_bytes() == kept
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "empty"))
    assert said("generate")[1].splitlines()[-1].startswith(f"{missing}put it back from a copy, or type")
