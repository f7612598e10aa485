"""Forks: a child goes on exactly where its parent stood, and its parent never notices."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_lab import compose, train
from llama_lab.cli import main
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config, run_hash
from llama_lab.config.schema import RunConfig
from llama_lab.lab.repeat.fork import fork
from llama_lab.training.metrics import read_rows
from llama_lab.training.saving.manifest import list_checkpoints

from ..training.conftest import assert_same_run, final_weights, steady, tiny_overrides
from ..training.processes import Gate, started, wait_for


def assert_same_rows_and_weights(first: Path, second: Path):
    """The same run, with samples in it."""
    assert_same_run(first, second)
    assert steady(second, "samples.jsonl")


def contents(folder: Path):
    """Every file below a folder: its checksum and when it was written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def refusal(path: Path, *overrides: str, update: str | None = None) -> list[str]:
    """What a fork is refused with, line by line behind the heading."""
    with pytest.raises(ConfigError) as caught:
        fork(path, list(overrides), update=update)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"{len(lines)} problem")
    return [line.strip() for line in lines]


def constant(text: Path, *overrides: str) -> RunConfig:
    """The tiny run at a constant rate, 20 updates with a checkpoint every 4."""
    words = [word for word in tiny_overrides(text) if not word.startswith("schedule.")]
    return compose([*words, "schedule=constant", "schedule.warmup_updates=2", *overrides])


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, finished, in a folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_LAB_OUTPUTS", str(tmp_path_factory.mktemp("trunk")))
        return train(constant(text)).folder


@pytest.fixture
def trunk(trained: Path, outputs: Path) -> Path:
    """It, finished, in this test's folder."""
    return Path(shutil.copytree(trained, outputs / "tiny" / trained.name))


def test_a_fork_with_a_longer_budget_is_the_longer_run(text, trunk, capsys):
    before = contents(trunk)
    result = fork(trunk, ["training_tokens=20480"], update="12", command=["llama-lab", "fork", "x"])
    assert (result.status, result.updates) == ("finished", 40)
    assert contents(trunk) == before
    longer = train(constant(text, "training_tokens=20480"))
    assert longer.folder != result.folder
    assert_same_rows_and_weights(longer.folder, result.folder)
    assert longer.summary["best/val/loss"] == result.summary["best/val/loss"]
    meta = json.loads((result.folder / "meta.json").read_text())
    parent = load_config(trunk / "config.yaml")
    assert result.folder.name.endswith(
        f"training_tokens-20480-from-{run_hash(parent)}-12-{run_hash(load_config(result.folder / 'config.yaml'))}"
    )
    assert {key: meta["lineage"][key] for key in ("parent", "path", "update", "tokens", "changes")} == {
        "parent": trunk.name,
        "path": str(trunk),
        "update": 12,
        "tokens": 6144,
        "changes": {"training_tokens": 20480},
    }
    assert (meta["run_id"], meta["command"], len(meta["starts"])) == (result.folder.name, ["llama-lab", "fork", "x"], 1)
    said = f"Fork of {trunk} after update 12 (6,144 tokens): training_tokens=20480"
    assert said in capsys.readouterr().out
    assert (result.folder / "train.log").read_text(encoding="utf-8").startswith(said)


def test_a_change_of_the_schedules_kind_alone_is_a_change(trunk, capsys):
    result = fork(trunk, ["schedule=linear"], update="12")
    assert json.loads((result.folder / "meta.json").read_text())["lineage"]["changes"]["schedule"] == "linear"
    assert "(6,144 tokens): schedule=linear" in capsys.readouterr().out


def test_a_trunk_has_several_cool_downs(trunk):
    short, long = (
        fork(trunk, ["schedule=wsd", f"schedule.cooldown_fraction={share}", "training_tokens=8192"], update="8").folder
        for share in (0.25, 0.5)
    )
    assert short != long
    changes = {"schedule": "wsd", "training_tokens": 8192, "schedule.cooldown_fraction": 0.25}
    kept = json.loads((short / "meta.json").read_text())["lineage"]["changes"]
    assert {key: kept.get(key) for key in changes} == changes
    rates = {name: {row["update"]: row["train/lr"] for row in steady(name) if "train/lr" in row} for name in (trunk, short, long)}
    peak = rates[trunk][6]
    assert rates[short] == {1: rates[trunk][1], 3: peak, 6: peak, 9: peak, 12: peak, 15: pytest.approx(peak / 4), 16: 0.0}
    assert rates[long] == {1: rates[trunk][1], 3: peak, 6: peak} | {
        update: pytest.approx(peak * (16 - update) / 8) for update in (9, 12, 15, 16)
    }
    # What lies before is the trunk's, and its best too, but not what the trunk reached afterwards.
    for folder in (short, long):
        validated = [row["val/loss"] for row in steady(folder) if "val/loss" in row]
        assert json.loads((folder / "summary.json").read_text())["best/val/loss"] == min(validated)
    assert [row for row in steady(short) if row["update"] < 8] == [row for row in steady(trunk) if row["update"] < 8]


def test_a_fork_reads_its_parents_text_from_any_directory(text, tmp_path, monkeypatch):
    shutil.copy(text, tmp_path / "near.jsonl")
    monkeypatch.chdir(tmp_path)
    parent = train(constant(Path("near.jsonl"))).folder
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert fork(parent, ["optim.max_lr=2e-3"], update="8").status == "finished"


def test_the_same_command_again_goes_on_or_says_that_it_is_done(trunk, tmp_path, outputs, capsys):
    words = ["fork", str(trunk), "--update", "8", "training_tokens=15360", "optim.max_lr=2e-3"]
    gate = Gate("update 18", tmp_path)
    with started(gate.before([sys.executable, "-m", "llama_lab", *words])) as process:
        gate.wait_for(process)
        wait_for(lambda: list(outputs.glob("tiny/*-from-*/checkpoints/tokens-000000000008192/manifest.json")), process)
        process.kill()
    (folder,) = outputs.glob("tiny/*-from-*")
    assert main(words) == 0
    unbroken = fork(trunk, ["training_tokens=15360", "optim.max_lr=2e-3", "name=unbroken"], update="8")
    assert_same_rows_and_weights(unbroken.folder, folder)
    capsys.readouterr()
    assert main(words) == 0
    assert f"Already finished: {folder}" in capsys.readouterr().out
    # Its parent's checkpoints are not needed any more.
    for checkpoint in list_checkpoints(trunk / "checkpoints"):
        checkpoint.path.rename(tmp_path / checkpoint.path.name)
    assert main(words) == 0
    assert refusal(trunk, "training_tokens=20480", update="8") == [f"--update 8 is no checkpoint of {trunk}; there is none"]


@pytest.mark.parametrize("own_folder", [False, True])
def test_a_fork_goes_on_without_its_parent(own_folder, trunk, tmp_path, outputs, capsys):
    words = ["fork", str(trunk), "--update", "8", "training_tokens=15360", "optim.max_lr=2e-3"]
    unbroken = fork(trunk, ["training_tokens=15360", "optim.max_lr=2e-3", "name=unbroken"], update="8").folder
    gate = Gate("update 18", tmp_path)
    with started(gate.before([sys.executable, "-m", "llama_lab", *words])) as process:
        gate.wait_for(process)
        wait_for(lambda: list(outputs.glob("tiny/*-from-*/checkpoints/tokens-000000000008192/manifest.json")), process)
        process.kill()
    (folder,) = outputs.glob("tiny/*-from-*")
    shutil.rmtree(trunk)
    again = ["fork", str(folder.parent / ".." / folder.parent.name / folder.name)] if own_folder else words
    assert main(again) == 0
    assert "Continuing after update 16 of 30" in capsys.readouterr().out
    assert_same_rows_and_weights(unbroken, folder)
    assert main(again) == 0
    assert f"Already finished: {folder}" in capsys.readouterr().out
    # What was never begun cannot be begun any more.
    for changes in (["training_tokens=20480"], ["training_tokens=15360", "optim.max_lr=2e-3", "fresh=true"]):
        (line,) = refusal(trunk, *changes, update="8")
        assert line.startswith(f"{trunk} does not exist")
    assert refusal(trunk, "training_tokens=20480", "optm.max_lr=1", update="8") == [
        "optm.max_lr=1 is no field; did you mean optim.max_lr?"
    ]


def test_of_forks_that_differ_in_their_beginning_one_has_to_be_named(trunk):
    words = ["training_tokens=12288"]
    folders = [fork(trunk, words, update=update).folder for update in ("8", "16")]
    shutil.rmtree(trunk)
    assert refusal(trunk, *words) == [
        f"--update last cannot be told, because {trunk} is gone; it was forked with these values after updates 8, 16: name one"
    ]
    assert [fork(trunk, words, update=update).folder for update in ("8", "16")] == folders


def test_a_fork_of_a_fork(trunk):
    child = fork(trunk, ["training_tokens=12288"], update="20")
    grandchild = fork(child.folder, ["training_tokens=14336"])
    lineage = json.loads((grandchild.folder / "meta.json").read_text())["lineage"]
    assert (lineage["parent"], lineage["update"], grandchild.updates) == (child.folder.name, 24, 28)


def test_which_checkpoint(tiny, trunk):
    def start(update: str | None) -> int:
        folder = fork(trunk, ["training_tokens=10752", "schedule.min_lr=1e-9"], update=update).folder
        return json.loads((folder / "meta.json").read_text())["lineage"]["update"]

    rows = {row["update"]: row["val/loss"] for row in read_rows(trunk / "metrics.jsonl") if "val/loss" in row}
    assert start(None) == start("last") == 20
    assert start("best") == min({20} & rows.keys(), key=lambda update: rows[update])
    assert start("4") == 4
    assert refusal(trunk, "training_tokens=20480", update="7") == [
        f"--update 7 is no checkpoint of {trunk}; there are 4, 8, 12, 16, 20"
    ]
    assert refusal(trunk, "training_tokens=20480", update="first") == [
        "--update first is no update; there are 4, 8, 12, 16, 20, or last, or best"
    ]
    unseen = train(tiny("eval=null")).folder
    assert refusal(unseen, "training_tokens=20480", update="best") == [
        "--update best cannot be told: no checkpoint was validated; there are 4, 8, 12, 16, 20"
    ]


def test_what_cannot_change_is_said_at_once(trunk):
    assert refusal(trunk, "model.dim=64", "data.max_seq_len=64", "data.tokens_per_update=1024", "optim=adamw", "tokenizer=bpe") == [
        "model.dim=64 cannot change in a fork: the weights are made for 32",
        "data.max_seq_len=64 cannot change in a fork: updates are counted, and the data read, in steps of 32",
        "data.tokens_per_update=1024 cannot change in a fork: updates are counted, and the data read, in steps of 512",
        "optim=adamw cannot change in a fork: its state is that of optim=muon",
        "tokenizer=bpe cannot change in a fork: the weights know the ids of the parent's",
    ]
    assert refusal(trunk, update="4") == [
        "this fork would repeat its parent: type what changes, e.g. schedule.cooldown_fraction=0.2, training_tokens=…, "
        "optim.max_lr=…"
    ]
    assert refusal(trunk, "training_tokens=6000", update="12") == [
        "training_tokens=6000 ends after update 11, and the checkpoint is of update 12; at least 6656"
    ]
    # So short a run would not leave its warm-up either, which is not what to mend.
    assert refusal(trunk, "training_tokens=1_024", "optm.max_lr=1", update="12") == [
        "training_tokens=1024 ends after update 2, and the checkpoint is of update 12; at least 6656",
        "optm.max_lr=1 is no field; did you mean optim.max_lr?",
    ]


def test_mistakes_have_the_answers_of_train(trunk):
    assert refusal(trunk, "optm.max_lr=1e-3", "optim.max_lr=abc", "schedule=wds", "experiment=smoke", "training_tokens=-1") == [
        "schedule=wds is no option; did you mean schedule=wsd? there are constant, cosine, linear, wsd",
        "experiment=smoke sets values for a run from its beginning; type the values that change instead",
        "optm.max_lr=0.001 is no field; did you mean optim.max_lr?",
        "optim.max_lr=abc is not a number; e.g. optim.max_lr=0.008",
        "training_tokens=-1 is below 1; try 10240",
    ]
    assert refusal(trunk, "schedule=wsd", "schedule.cooldown_fraction=2") == [
        "schedule.cooldown_fraction=2.0 is outside (0, 1]; try 0.4, or schedule=constant for none"
    ]


def test_no_run_and_no_checkpoint(tiny, tmp_path, outputs):
    assert refusal(tmp_path, "seed.data=1") == [f"{tmp_path} holds no run; name a run's folder, outputs/<name>/<run id>"]
    assert refusal(tmp_path / "x", "seed.data=1") == [
        f"{tmp_path / 'x'} does not exist; name a run's folder, outputs/<name>/<run id>"
    ]
    young = train(tiny()).folder
    for checkpoint in list_checkpoints(young / "checkpoints"):
        checkpoint.path.rename(tmp_path / checkpoint.path.name)
    (said,) = refusal(young, "training_tokens=20480")
    assert said.startswith(f"{young} is finished, and its checkpoints are gone; put checkpoints/ back from a copy, or ")


def test_a_damaged_checkpoint_is_named_and_nothing_is_begun(trunk, outputs):
    weights = list_checkpoints(trunk / "checkpoints")[1].path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert refusal(trunk, "training_tokens=20480", update="8") == [
        f"{weights} is not what was saved (its checksum differs); the newest whole checkpoint is --update 20"
    ]
    assert list(outputs.glob("tiny/*-from-*")) == []


def test_a_folder_that_was_forked_from_another_state_is_not_gone_on_with(trunk):
    words = ["training_tokens=10752"]
    folder = fork(trunk, words, update="16").folder
    meta = json.loads((folder / "meta.json").read_text())
    meta["lineage"]["checkpoint_sha256"]["model.safetensors"] = "0"
    (folder / "meta.json").write_text(json.dumps(meta))
    assert refusal(trunk, *words, update="16") == [
        f"{folder} began with another state of update 16 than {trunk} has now; fresh=true moves it aside and forks anew"
    ]
    assert fork(trunk, [*words, "fresh=true"], update="16").folder == folder
    assert_same_rows_and_weights(folder.with_name(f"{folder.name}.1"), folder)


def test_other_text_keeps_the_vocabulary(tiny, tmp_path):
    parent = train(tiny("tokenizer=bpe", "tokenizer.vocab_size=280")).folder
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, in letters that were rare before: zxqj. " * 200, encoding="utf-8")
    child = fork(parent, ["data=text", f"data.path={other}", "training_tokens=12288"], update="20").folder
    run = load_config(child / "config.yaml")
    assert (run.data.max_seq_len, run.data.tokens_per_update) == (32, 512)
    kept = Path(run.tokenizer.path)  # pyright: ignore[reportAttributeAccessIssue]
    assert kept.parent == parent.parent / ".tokenizers"
    assert kept.read_bytes() == (parent / "tokenizer.json").read_bytes()
    facts = [json.loads((folder / "meta.json").read_text())["data"] for folder in (parent, child)]
    assert facts[0]["tokenizer"] == facts[1]["tokenizer"]
    assert facts[0]["data"] != facts[1]["data"]
    strange = train(tiny("tokenizer=bpe", "tokenizer.vocab_size=270")).folder / "tokenizer.json"
    assert refusal(parent, "tokenizer=file", f"tokenizer.path={strange}", "training_tokens=12288") == [
        "tokenizer=file is another than the parent's, whose ids the weights know; "
        f"the parent's is tokenizer=file tokenizer.path={parent / 'tokenizer.json'}"
    ]
    assert main(["verify", str(child)]) == 0, "what the parent was fed is not held against it"
    shutil.rmtree(parent)
    assert fork(parent, ["data=text", f"data.path={other}", "training_tokens=12288"], update="20").folder == child


def test_changed_text_has_to_be_accepted(tiny, text, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_bytes(text.read_bytes())
    parent = train(tiny(f"data.path={own}")).folder
    with own.open("a", encoding="utf-8") as file:
        file.write('{"text": "one document more"}\n')
    (line,) = refusal(parent, "training_tokens=12288")
    assert line.startswith("the data changed from ")
    assert line.endswith(" since the parent was trained; accept_changes=true forks all the same")
    assert fork(parent, ["training_tokens=12288", "accept_changes=true"]).status == "finished"


def test_on_the_command_line(trunk, capsys, outputs):
    assert main(["fork", str(trunk), "training_tokens=12288", "--update", "8", "--cfg"]) == 0
    shown = capsys.readouterr().out
    assert "training_tokens: 12288" in shown
    assert f", from update 8 of {trunk}" in shown
    assert list(outputs.glob("tiny/*-from-*")) == []
    for words, hint in [
        (["fork"], "llama-lab fork takes one run's folder, outputs/<name>/<run id>; none is named"),
        (["fork", "a", "b"], "llama-lab fork takes one run's folder, outputs/<name>/<run id>; 2 are named: a b"),
        (["fork", "a", "--update"], "--update needs the number of an update, or last, or best"),
        (["fork", "a", "--udate", "3"], "llama-lab fork has no flag --udate; did you mean --update?"),
    ]:
        assert main(words) == 2
        assert capsys.readouterr().err.strip() == hint


def test_a_finished_run_says_how_it_is_trained_further(text, trunk, capsys):
    train(constant(text))
    said = capsys.readouterr().out
    (command,) = [line.partition(": ")[2] for line in said.splitlines() if "to train it further" in line]
    assert command == f"llama-lab fork {trunk} --update 20 training_tokens=20480"
    assert main(command.split()[1:]) == 0


def test_several_processes_fork_together(trunk, outputs):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "llama_lab", "fork"]
    words = [str(trunk), "--update", "8", "training_tokens=6144", "hardware.processes=2"]
    done = subprocess.run([*start, *words], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    (folder,) = outputs.glob("tiny/*-from-*")
    alone = fork(trunk, ["training_tokens=6144", "name=alone"], update="8").folder
    expected, found = final_weights(alone), final_weights(folder)
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 1e-4
