"""A run sent to W&B afterwards arrives as it would have arrived while it was trained."""

import json
import re
import shutil
from pathlib import Path

import pytest

from llama_lab import compose, train
from llama_lab.cli import main
from llama_lab.training.metrics import read_rows
from llama_lab.training.tracking import tracker as tracking

from ..training.conftest import tiny_overrides
from ..training.processes import ENDLESS, command, started, wait_for
from ..training.wandb_reader import history, offline_folders, read_records, sampled_texts, summary

THERE = "an offline run that holds all of it is there already"


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a tracker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_LAB_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        return train(compose(tiny_overrides(text))).folder


@pytest.fixture
def run(trained: Path, outputs: Path) -> Path:
    """It, in this test's folder."""
    return Path(shutil.copytree(trained, outputs / "tiny" / trained.name))


def said(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_what_arrives_is_what_was_written(run, capsys):
    assert main(["track", str(run), "--mode", "offline", "--project", "mine", "--entity", "us"]) == 0
    (folder,) = offline_folders(run)
    assert said(capsys) == [f"{run}: 12 rows and 9 samples: wandb leet {folder}   (offline; wandb sync {folder} sends it)"]
    records = read_records(folder)
    rows = read_rows(run / "metrics.jsonl")
    assert history(records) == rows != []
    assert sampled_texts(folder) == [(row["update"], row["prompt"], row["text"]) for row in read_rows(run / "samples.jsonl")]
    validated = [row["val/loss"] for row in rows if "val/loss" in row]
    last = summary(records)
    assert (last["val/loss"], last["best/val/loss"]) == (validated[-1], min(validated))
    (opened,) = records["run"]
    assert (opened["project"], opened["entity"], opened["run_group"], opened["job_type"]) == ("mine", "us", "tiny", "train")
    assert opened["run_id"] == json.loads((run / "meta.json").read_text())["wandb_id"]
    assert opened["config"]["update"]["model"]["dim"] == 32
    plotted = {record["glob_name"]: record["step_metric"] for record in records["metric"] if "glob_name" in record}
    assert plotted == dict.fromkeys(("train/*", "val/*", "speed/*", "memory/*"), "tokens")


def test_it_is_sent_once_and_what_comes_later_is_added(run, capsys):
    assert main(["track", str(run)]) == 0, "WANDB_MODE=offline in the tests' environment"
    assert main(["track", str(run)]) == 0
    (first,) = offline_folders(run)
    place = f"wandb leet {first}   (offline; wandb sync {first} sends it)"
    assert said(capsys) == [f"{run}: 12 rows and 9 samples: {place}", f"{run}: {THERE}: {place}"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"update": 21, "tokens": 10752, "seconds": 9.0, "train/loss": 1.0}\n')
    assert main(["track", str(run)]) == 0
    second = offline_folders(run)[1]
    assert history(read_records(second)) == [{"update": 21, "tokens": 10752, "seconds": 9.0, "train/loss": 1.0}]
    assert read_records(second)["run"][0]["run_id"] == read_records(first)["run"][0]["run_id"]
    # Another project has nothing of it yet, and a run that was removed is sent anew.
    assert main(["track", str(run), "--project", "other"]) == 0
    for folder in offline_folders(run):
        shutil.rmtree(folder)
    capsys.readouterr()
    assert main(["track", str(run)]) == 0
    assert "W&B may hold a part of it as " in said(capsys)[0]
    assert len(history(read_records(offline_folders(run)[0]))) == 13


def test_a_run_that_lost_its_tracker_is_sent_whole_under_another_id(text, capsys):
    words = [word for word in tiny_overrides(text) if word != "wandb=null"]
    run = train(compose([*words, "wandb.mode=offline"])).folder
    sent = json.loads((run / "wandb" / "sent.json").read_text())
    sent[0]["lost"] = "ConnectionResetError: Connection lost"
    (run / "wandb" / "sent.json").write_text(json.dumps(sent))
    capsys.readouterr()
    assert main(["track", str(run)]) == 0
    before, after = offline_folders(run)
    ids = [read_records(folder)["run"][0]["run_id"] for folder in (before, after)]
    assert ids[0] == json.loads((run / "meta.json").read_text())["wandb_id"] != ids[1]
    assert said(capsys)[0] == f"{run}: W&B may hold a part of it as {ids[0]}; this is a run of its own beside that"
    assert history(read_records(after)) == read_rows(run / "metrics.jsonl")
    # One that lost nothing is there already.
    sent[0]["lost"] = None
    (run / "wandb" / "sent.json").write_text(json.dumps(sent))
    assert main(["track", str(run)]) == 0
    assert said(capsys) == [f"{run}: {THERE}: wandb leet {before}   (offline; wandb sync {before} sends it)"]


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("preempted", 75), ("failed", 1), ("running", 1)])
def test_wandb_is_told_how_the_run_ended(run, status, code):
    changed = json.loads((run / "summary.json").read_text()) | {"status": status}
    (run / "summary.json").write_text(json.dumps(changed))
    assert main(["track", str(run)]) == 0
    ((folder,)) = offline_folders(run)
    assert read_records(folder)["exit"][0].get("exit_code", 0) == code


def test_several_runs_and_patterns(run, trained, outputs, capsys):
    second = Path(shutil.copytree(trained, outputs / "tiny" / "second"))
    assert main(["track", str(outputs / "ti*" / "*"), str(run)]) == 0
    assert sorted(line.partition(":")[0] for line in said(capsys)) == sorted([str(run), str(second)])
    ids = {read_records(offline_folders(folder)[0])["run"][0]["run_id"] for folder in (run, second)}
    assert len(ids) == 2


def test_mistakes_are_named_all_at_once_and_nothing_is_sent(run, tmp_path, outputs, capsys):
    empty = Path(shutil.copytree(run, outputs / "tiny" / "empty"))
    (empty / "metrics.jsonl").unlink()
    assert main(["track", str(run), str(empty), str(tmp_path / "no"), str(tmp_path), str(tmp_path / "x*")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "ConfigError: 4 problems in this request",
        f"  {tmp_path / 'x*'} matches nothing; name runs' folders, outputs/<name>/<run id>",
        f"  {empty} has no rows in metrics.jsonl; there is nothing to send",
        f"  {tmp_path / 'no'} does not exist; name a run's folder, outputs/<name>/<run id>",
        f"  {tmp_path} holds no run; name a run's folder, outputs/<name>/<run id>",
    ]
    assert offline_folders(run) == []


def test_a_run_that_is_being_trained_is_left_alone(text, outputs, capsys):
    with started(command(text, *ENDLESS)) as process:
        (found,) = wait_for(lambda: list(outputs.glob("tiny/*/metrics.jsonl")), process)
        assert main(["track", str(found.parent)]) == 2
    line = capsys.readouterr().err.splitlines()[1]
    sentence = (
        rf"  {re.escape(str(found.parent))} is being trained by process {process.pid} on \S+ since .*; send it when it has ended"
    )
    assert re.fullmatch(sentence, line), line


def test_without_a_network_it_says_what_works(run, monkeypatch, capsys):
    # Nothing listens on port 9 of this machine.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "INIT_SECONDS", 5.0)
    assert main(["track", str(run), "--mode", "online"]) == 1
    (line,) = said(capsys)
    sentence = r"not sent \(CommError: .*\); --mode offline writes a run that `wandb sync` sends later"
    assert re.fullmatch(f"{re.escape(str(run))}: {sentence}", line), line
    # The id was not used up.
    assert main(["track", str(run), "--mode", "offline"]) == 0
    assert len(said(capsys)) == 1


def test_a_tracker_that_is_switched_off_is_said(run, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert main(["track", str(run)]) == 2
    assert capsys.readouterr().err.splitlines()[1] == (
        "  WANDB_MODE=disabled is set in the environment, and means that nothing is sent; "
        "--mode online or --mode offline wins over it"
    )


def test_usage(capsys):
    assert main(["track"]) == 2
    assert "llama-lab track lacks RUN; type llama-lab track RUN (RUN is " in capsys.readouterr().err
    assert main(["track", "--help"]) == 0
    assert "usage: llama-lab track" in capsys.readouterr().out
