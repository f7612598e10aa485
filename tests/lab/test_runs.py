"""`llama-lab runs` on folders of runs that nobody trained."""

import csv
import io
import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from llama_lab.cli import main
from llama_lab.lab.runs.listing import DEAD, find_folders, look_at

from .written_runs import Make

Output = pytest.CaptureFixture[str]


@pytest.fixture
def study(make: Make, outputs: Path) -> Path:
    """Two learning rates of two seeds, and a run that was stopped."""
    for lr, end in ((1e-3, 2.0), (2e-3, 1.9)):
        for seed in (0, 1):
            make(seed, end, lr)
    make(2, 2.2, 4e-3, last=12)
    return outputs / "tiny"


def test_a_budget_is_trained_in_whole_updates(make: Make):
    assert look_at(make(0, training_tokens=20 * 512 + 500)).total_tokens == 20 * 512


def listed(capsys: Output, *words: str) -> list[dict[str, object]]:
    assert main(["runs", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_runs_are_listed_with_what_they_say(study: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(study.parent.parent)
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("5 runs\n")
    assert shown.count("outputs/tiny/") == 5
    assert main(["runs", "status=dead"]) == 0
    assert capsys.readouterr().out == "None of 5 runs fits; by status: finished 4, preempted 1\n"
    assert main(["runs", "status=done"]) == 2
    assert (
        "status=done is no status; there are started, running, preempted, failed, dead, stopped early, finished"
        in capsys.readouterr().err
    )
    assert main(["runs", "status=finishd,pre*"]) == 2
    assert "status=finishd is no status; did you mean finished?" in capsys.readouterr().err
    assert {"finished", "preempted", "100", "60", "10,240", "2.4366", "llama_3m"} <= set(shown.split())


def test_what_a_sweep_left_before_its_end_is_stopped_early(study: Path, capsys: Output):
    (left,) = [folder for folder in find_folders([str(study)]) if look_at(folder).status == "preempted"]
    job = study / "sweeps" / "lr" / "jobs" / "0002"
    job.mkdir(parents=True)
    listing = {"jobs": [{"number": 2, "folder": os.path.relpath(left, job.parent.parent)}]}
    (job.parent.parent / "sweep.json").write_text(json.dumps(listing))
    (job / "outcome.json").write_text(json.dumps({"status": "interrupted"}))
    assert len(listed(capsys, str(study), "status=preempted")) == 1
    (job / "outcome.json").write_text(json.dumps({"status": "stopped early after update 12"}))
    assert look_at(left).status == "stopped early"
    assert len(listed(capsys, str(study), "status=stopped*")) == len(listed(capsys, str(study), "status=stopped early")) == 1
    assert main(["runs", str(study), "status=preempted"]) == 0
    assert "by status: finished 4, stopped early 1" in capsys.readouterr().out


def test_keys_of_configs_and_metrics_filter_and_sort(study: Path, capsys: Output):
    rows = listed(capsys, str(study), "optim.max_lr=0.002,4e-3", "--sort", "val/loss", "--columns", "optim.max_lr,val/loss,optim")
    assert [row["optim.max_lr"] for row in rows] == [2e-3, 2e-3, 4e-3]
    assert {row["optim"] for row in rows} == {"muon"}
    assert len(listed(capsys, str(study), "val/loss<1.95")) == 2
    assert len(listed(capsys, str(study), "status!=finished", "seed.init>=2")) == 1
    assert len(listed(capsys, str(study), "model=llama_*", "status=finished")) == 4
    losses = [row["val/loss"] for row in listed(capsys, str(study), "--sort=-val/loss", "--columns", "+seed.init")]
    assert losses == sorted(losses, key=lambda loss: -float(str(loss)))


def test_a_run_without_a_number_stands_last_whichever_way_and_lists_are_shown(study: Path, make: Make, capsys: Output):
    nameless = make(7, None, 8e-3)
    config = nameless / "config.yaml"
    sets = config.read_text(encoding="utf-8").replace("  prompt_sets: []\n", "  prompt_sets:\n  - summary\n  - spelling\n")
    config.write_text(sets, encoding="utf-8")
    for key in ("val/loss", "-val/loss"):
        rows = listed(capsys, f"--sort={key}", "--columns", "run,val/loss,sample.prompt_sets,model.dim")
        assert Path(str(rows[-1]["run"])).name == nameless.name
    assert [row["sample.prompt_sets"] for row in rows] == ["[]"] * 5 + ["[summary,spelling]"]
    for typed, count in ("spelling", 1), ("[summary,spelling]", 1), ("[]", 5), ("s*", 1):
        assert len(listed(capsys, f"sample.prompt_sets={typed}")) == count
    assert len(listed(capsys, "sample.prompt_sets!=summary")) == 5
    assert main(["runs", "sample.prompt_sets=speling"]) == 0
    assert capsys.readouterr().out.endswith("; sample.prompt_sets: [], [summary,spelling]\n")


def test_what_tells_runs_of_a_study_apart_is_said(study: Path, make: Make, capsys: Output):
    make(5, name="other")
    told = {str(row["differs"]) for row in listed(capsys)}
    assert told == {"", "init=2 data=2 max_lr=0.004"} | {
        f"init={seed} data={seed} max_lr={lr}" for seed in (0, 1) for lr in (0.001, 0.002)
    }


def test_csv_is_what_a_spreadsheet_reads(study: Path, capsys: Output):
    assert main(["runs", str(study), "--csv", "--columns", "run,tokens"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert sorted({int(row["tokens"]) for row in rows}) == [6144, 10240]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["max_lr=1"], "did you mean optim.max_lr?"),
        (["--sort", "val/los"], "--sort val/los is about a key that no run has; did you mean val/loss?"),
        (["--columns", "frobnicate,run"], "--columns frobnicate is about a key that no run has"),
        (["nowhere"], "nowhere names no run"),
        (["val/loss=<3"], "val/loss=<3 is no condition; did you mean 'val/loss<=3'?"),
        (["val/loss==3"], "did you mean 'val/loss=3'?"),
        (["val/loss=>3"], "did you mean 'val/loss>=3'?"),
        (["status<>dead"], "did you mean 'status!=dead'?"),
        (["val/loss<<3"], "did you mean 'val/loss<3'?"),
        (["val/loss<abc"], "val/loss<abc compares with no number; val/loss=… takes texts and patterns"),
    ],
)
def test_mistakes_are_answered(words: list[str], hint: str, study: Path, capsys: Output):
    assert main(["runs", str(study), *words]) == 2
    assert hint in capsys.readouterr().err


def test_a_mistyped_folder_is_told_what_is_near(study: Path, capsys: Output):
    mistyped = study.with_name("tinny")
    for command in ("runs", "verify", "compare", "track", "serve"):
        assert main([command, str(mistyped)]) == 2
        said = capsys.readouterr().err
        assert f"{mistyped} " in said and f"; did you mean {study}?" in said


def test_broken_folders_are_named_and_the_others_listed(study: Path, capsys: Output):
    first, second, third, *_ = sorted(path for path in study.iterdir() if path.name != ".locks")
    (first / "summary.json").write_text("{", encoding="utf-8")
    (second / "config.yaml").unlink()
    (third / "config.yaml").write_text("a: 1\n", encoding="utf-8")
    assert main(["runs", str(study)]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("2 runs")
    assert f"{first.name} has a damaged summary.json" in shown.err
    assert f"{second.name} has no config.yaml" in shown.err
    assert f"{third.name} has a config.yaml that is none of ours" in shown.err


def test_a_run_that_was_moved_aside_is_not_listed_and_one_without_process_is_dead(study: Path, make: Make):
    folder = make(7, status="running")
    shutil.copytree(folder, folder.with_name(f"{folder.name}.1"))
    aside = folder.with_name(f"{folder.name}.1")
    assert aside not in find_folders([str(study)])
    assert aside not in find_folders([f"{study}/*"])
    assert find_folders([f"{study}/*.[0-9]"]) == [aside], "it was asked for"
    assert look_at(folder).status == DEAD
    locks = study / ".locks"
    locks.mkdir()
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": "now"}
    (locks / f"{folder.name}.json").write_text(json.dumps(holder), encoding="utf-8")
    assert look_at(folder).status == "running"
    (locks / f"{folder.name}.json").write_text(json.dumps(holder | {"host": "elsewhere"}), encoding="utf-8")
    assert look_at(folder).status == "running"
    assert look_at(folder, now=time.time() + 3600).status == DEAD


def test_a_thousand_runs_are_listed_in_two_seconds_without_torch(make: Make, llama_lab, outputs: Path):
    first = make()
    for number in range(999):
        folder = first.with_name(f"run-{number}")
        folder.mkdir()
        for name in ("config.yaml", "summary.json", "metrics.jsonl"):
            os.link(first / name, folder / name)
    best = 99.0
    for _ in range(3):  # a busy machine is given three chances
        started = time.process_time() + os.times().children_user
        done = llama_lab("runs", PYTHONPROFILEIMPORTTIME="1")
        best = min(best, time.process_time() + os.times().children_user - started)
        if best < 2:
            break
    assert done.stdout.startswith("1000 runs")
    assert " torch\n" not in done.stderr
    assert best < 2


def test_nothing_there_says_what_makes_a_run(outputs: Path, capsys: Output):
    assert main(["runs"]) == 0
    assert f"There is no run in {outputs}; llama-lab train makes one" in capsys.readouterr().out


def test_flags_may_stand_between_what_they_are_about(study: Path, capsys: Output):
    rows = listed(capsys, str(study), "--sort", "val/loss", "status=finished")
    assert len(rows) == 4
