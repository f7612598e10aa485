"""Trackers never matter: whatever happens to W&B, training goes on, one line says so, and metrics.jsonl is whole."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_lab import compose, train
from llama_lab.config.identity import run_folder, save_config
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import RunConfig
from llama_lab.training.metrics import read_rows
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.tracking import tracker as tracking
from llama_lab.training.tracking.sent import GrowingRows, read_sent, rows_in
from llama_lab.training.tracking.tracker import start_tracker

from .conftest import steady, tiny_overrides
from .processes import Gate, end_of, folder_of, started
from .wandb_reader import history, offline_folders, read_records, sampled_texts, summary

EACH = ["log.every_updates=1"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture
def tracked(text: Path):
    """Compose the tiny run with its tracker on, offline unless said otherwise."""

    def make(*overrides: str) -> RunConfig:
        return compose([*words(text), "wandb.mode=offline", *overrides])

    return make


def words(text: Path) -> list[str]:
    return [word for word in tiny_overrides(text) if word != "wandb=null"]


class Rows:
    """A run's folder whose rows are written by hand, and a tracker that follows it."""

    def __init__(self, run: RunConfig):
        self.run = resolve(run)
        self.folder = RunFolder(run_folder(self.run))
        self.folder.path.mkdir(parents=True, exist_ok=True)
        save_config(self.run, self.folder.path / "config.yaml")
        self.said: list[str] = []

    def start(self):
        return start_tracker(self.run, self.folder, self.said.append)

    def write(self, first: int, last: int):
        with (self.folder.path / "metrics.jsonl").open("a") as file:
            file.writelines(
                json.dumps({"update": update, "tokens": update * 512, "seconds": update / 10, "train/loss": 5 / update}) + "\n"
                for update in range(first, last + 1)
            )

    def sent(self):
        return [row for folder in offline_folders(self.folder.path) for row in history(read_records(folder))]

    def gone(self, reason: str) -> str:
        path = tracking.relative(self.folder.path)
        return f"W&B is gone ({reason}); metrics.jsonl is complete; send it later with: llama-lab track {path}"


def wait_for(condition, seconds: float = 170.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return found


def descendants(process: int, name: str) -> list[int]:
    """Processes below one, whose command line holds `name`."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                line = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
                found += [child] if name in line else []
                found += descendants(child, name)
    return found


def test_wandb_gets_every_row_with_its_axes_and_every_sample(tracked):
    result = train(tracked())
    (folder,) = offline_folders(result.folder)
    records = read_records(folder)
    assert history(records) == read_rows(result.folder / "metrics.jsonl") != []
    written = [(row["update"], row["prompt"], row["text"]) for row in read_rows(result.folder / "samples.jsonl")]
    assert sampled_texts(folder) == written != []
    hidden = {record["name"] for record in records["metric"] if record.get("options", {}).get("hidden")}
    assert hidden == {"update", "tokens", "seconds"}
    plotted = {record["glob_name"]: record["step_metric"] for record in records["metric"] if "glob_name" in record}
    assert plotted == dict.fromkeys(("train/*", "val/*", "speed/*", "memory/*"), "tokens")


def test_wandb_is_told_what_the_run_is_and_how_it_ended(tracked, capsys):
    run = tracked("wandb.tags=[a,b]", "wandb.project=mine", "name=study")
    result = train(run, command=["llama-lab", "train", "x=1"])
    (folder,) = offline_folders(result.folder)
    records = read_records(folder)
    (opened,) = records["run"]
    assert (opened["project"], opened["run_group"], opened["job_type"]) == ("mine", "study", "train")
    assert sorted(opened["tags"]) == ["a", "b"]
    assert opened["display_name"] == result.folder.name
    assert opened["run_id"] == json.loads((result.folder / "meta.json").read_text())["wandb_id"]
    assert opened["config"]["update"]["model"]["dim"] == 32
    assert opened["config"]["update"]["data"]["window"] == "contiguous"
    # Options of one shape have the same fields, and are told apart by name alone.
    assert opened["config"]["update"]["schedule"]["type"] == "wsd"
    assert opened["config"]["update"]["origin"]["choices"] == run.origin.choices != {}
    assert records["exit"][0].get("exit_code", 0) == 0
    validated = [row["val/loss"] for row in read_rows(result.folder / "metrics.jsonl") if "val/loss" in row]
    last = summary(records)
    assert (last["val/loss"], last["best/val/loss"]) == (validated[-1], min(validated))
    assert f"wandb leet {folder}   (offline; wandb sync {folder} sends it)" in capsys.readouterr().out


def test_a_run_that_is_killed_and_continued_sends_each_row_once(tracked, text, outputs, tmp_path):
    command = [sys.executable, "-m", "llama_lab", "train", *words(text), *EACH, "name=killed", "wandb.mode=offline"]
    gate = Gate("update 14", tmp_path)
    with started(gate.before(command)) as process:
        gate.wait_for(process)
        folder = folder_of(outputs, "killed")
        wait_for(lambda: [sent for sent in read_sent(folder) if sent.metrics[0] >= 10])
        process.kill()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=170)
    first, second = (history(read_records(offline)) for offline in offline_folders(folder))
    places = [(row["update"], "val/loss" in row) for row in first + second]
    assert places == [(row["update"], "val/loss" in row) for row in read_rows(folder / "metrics.jsonl")]
    (sent,) = read_sent(folder)
    assert (sent.closed, sent.lost, sent.metrics) == (True, None, [20, 2])


def test_a_run_that_had_no_tracker_so_far_is_sent_whole_when_it_gets_one(tracked):
    rows = Rows(tracked())
    rows.write(1, 30)
    tracker = rows.start()
    tracker.listen()
    rows.write(31, 40)
    tracker.finish(0)
    assert rows.sent() == read_rows(rows.folder.path / "metrics.jsonl")
    assert rows.said == []


@linux
@pytest.mark.parametrize("victim", ["wandb-core", "llama_lab.training.tracking.wandb_run"])
def test_killing_wandb_costs_a_warning_and_nothing_else(tracked, text, outputs, tmp_path, victim):
    command = [sys.executable, "-m", "llama_lab", "train", *words(text), *EACH, "name=killed", "wandb.mode=offline"]
    gate = Gate("update 14", tmp_path)
    with started(gate.before(command)) as process:
        gate.wait_for(process)
        folder = folder_of(outputs, "killed")
        wait_for(lambda: [sent for sent in read_sent(folder) if sent.metrics[0] >= 10])
        (file,) = offline_folders(folder)[0].glob("run-*.wandb")
        # They reach the disk in a second, not in the library's fifteen.
        wait_for(lambda: (rows_in(file) or 0) >= 10, seconds=10)
        (helper,) = descendants(process.pid, victim)
        os.kill(helper, signal.SIGKILL)
        gate.open()
        out = end_of(process)
    assert process.returncode == 0, out
    reason = {
        "wandb-core": r"(ConnectionResetError: .*|BrokenPipeError: .*)",
        "llama_lab.training.tracking.wandb_run": "its process ended with exit code -9",
    }[victim]
    (line,) = [line for line in out.splitlines() if "W&B" in line]
    # The connection to a process of its own is found broken at a later row, or at the end of a run that is over by then.
    sentence = rf"W&B is gone \({reason}\); (training goes on, )?metrics.jsonl is complete; send it later with: llama-lab track "
    assert re.fullmatch(sentence + re.escape(str(folder)), line), line
    undisturbed = train(compose([*words(text), *EACH, "wandb=null"]))
    assert steady(folder) == steady(undisturbed.folder) != []


@linux
def test_a_wandb_that_hangs_is_left_behind_in_a_bounded_time(tracked, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1.0)
    monkeypatch.setattr(tracking, "SLACK_SECONDS", 2.0)
    rows = Rows(tracked())
    tracker = rows.start()
    tracker.listen()
    wait_for(lambda: read_sent(rows.folder.path))
    (helper,) = descendants(os.getpid(), "wandb-core")
    os.kill(helper, signal.SIGSTOP)
    try:
        began = time.monotonic()
        rows.write(1, 20_000)
        tracker.listen()
        assert time.monotonic() - began < 10
        tracker.finish(0)
        assert time.monotonic() - began < 30
    finally:
        os.kill(helper, signal.SIGKILL)
    assert rows.said == [rows.gone("no answer within 3 s")]
    assert tracker.where() is None


def test_without_a_network_the_run_is_written_offline(tracked, monkeypatch):
    # Nothing listens on port 9 of this machine.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "INIT_SECONDS", 6.0)
    rows = Rows(tracked("wandb.mode=online"))
    rows.write(1, 10)
    tracker = rows.start()
    tracker.finish(0)
    (line,) = rows.said
    assert re.fullmatch(r"W&B does not start online \(CommError: .*\); this run is written offline instead", line), line
    assert rows.sent() == read_rows(rows.folder.path / "metrics.jsonl")
    (offline,) = offline_folders(rows.folder.path)
    assert tracker.where() == f"wandb leet {offline}   (offline; wandb sync {offline} sends it)"


def test_without_a_key_nobody_is_asked_for_one(tracked, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    rows = Rows(tracked("wandb.mode=online"))
    tracker = rows.start()
    tracker.finish(0)
    (line,) = rows.said
    assert re.fullmatch(r"W&B does not start online \(UsageError: .*\); this run is written offline instead", line), line
    assert len(offline_folders(rows.folder.path)) == 1


@pytest.mark.parametrize(("asked", "folders"), [("disabled", 0), ("offline", 1), ("dryrun", 1)])
def test_the_environment_decides_where_the_config_says_auto(tracked, monkeypatch, asked, folders):
    monkeypatch.setenv("WANDB_MODE", asked)
    rows = Rows(tracked("wandb.mode=auto"))
    rows.write(1, 3)
    rows.start().finish(0)
    assert rows.said == []
    assert len(offline_folders(rows.folder.path)) == folders


def test_what_is_typed_wins_over_the_environment(tracked, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    rows = Rows(tracked("wandb.mode=offline"))
    rows.start().finish(0)
    assert len(offline_folders(rows.folder.path)) == 1


def test_a_folder_that_cannot_be_written_costs_a_warning(tracked, capsys):
    run = tracked()
    folder = run_folder(resolve(run))
    folder.mkdir(parents=True)
    (folder / "wandb").write_text("in the way")
    result = train(run)
    assert result.status == "finished"
    lines = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    reason = f"FileExistsError: [Errno 17] File exists: '{folder / 'wandb'}'"
    ends = f"metrics.jsonl is complete; send it later with: llama-lab track {folder}"
    assert lines in ([f"W&B is gone ({reason}); {ends}"], [f"W&B is gone ({reason}); training goes on, {ends}"])
    assert len(steady(result.folder)) == 12


def test_a_full_disk_below_wandb_alone_is_noticed(tracked, text, outputs):
    """A small file system is mounted over the tracker's folder, in a name space of the process's own."""
    folder = run_folder(resolve(tracked()))
    command = shlex.join([sys.executable, "-m", "llama_lab", "train", *words(text), "wandb.mode=offline"])
    (folder / "wandb").mkdir(parents=True)
    mount = shlex.join(["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(folder / "wandb")])
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount} && {command}"], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "W&B" in line]
    assert re.fullmatch(
        r"W&B is gone \((OSError: .* holds \d+ of 15 rows; is the disk full\?|OSError: \[Errno 28\] No space left on device.*)\); "
        rf"(training goes on, )?metrics.jsonl is complete; send it later with: llama-lab track {re.escape(str(folder))}",
        line,
    ), line
    assert len(steady(folder)) == 12


def test_rows_that_did_not_reach_the_file_are_missed(tracked):
    rows = Rows(tracked())
    tracker = rows.start()
    tracker.listen()
    rows.write(1, 5)
    folder = wait_for(lambda: next(iter(offline_folders(rows.folder.path)), None))
    file = wait_for(lambda: next(folder.glob("run-*.wandb"), None))
    wait_for(lambda: rows_in(file) == 5)
    os.truncate(file, 7)  # W&B's own header stays
    tracker.finish(0)
    assert rows.said == [rows.gone(f"OSError: {folder} holds 0 of 5 rows; is the disk full?")]


def test_a_wandb_run_of_the_caller_stays_the_caller_s(tracked, text, tmp_path):
    code = f"""
import wandb
from llama_lab import compose, train
mine = wandb.init(project="mine", dir={str(tmp_path)!r}, mode="offline", settings=wandb.Settings(silent=True))
mine.log({{"before": 1}})
train(compose({[*words(text), "wandb.mode=offline"]!r}))
assert wandb.run is mine
mine.log({{"after": 2}})
mine.finish()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert [list(row) for row in history(read_records(offline_folders(tmp_path)[0]))] == [["before"], ["after"]]


def test_a_growing_file_gives_each_row_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = GrowingRows(path, [0, 0])
    assert rows.new() == []
    path.write_text('{"update": 1}\n{"update": 2, "a": 1}\n{"update": 2, "b": 1}\n{"upd')
    assert [list(row) for row in rows.new()] == [["update"], ["update", "a"], ["update", "b"]]
    assert rows.new() == []
    with path.open("a") as file:
        file.write('ate": 3}\n')
    assert rows.new() == [{"update": 3}]
    # Cut back by a resume, which makes the row that was there before and goes on.
    draft = tmp_path / "draft"
    draft.write_text('{"update": 1}\n{"update": 2, "a": 1}\n')
    draft.replace(path)
    assert rows.new() == []
    with path.open("a") as file:
        file.write('{"update": 2, "b": 1}\n{"update": 3}\n{"update": 4}\n')
    assert rows.new() == [{"update": 4}]
    assert GrowingRows(path, [3, 1]).new() == [{"update": 4}]


def test_rows_in_wandb_s_file_are_counted_as_its_own_tool_counts_them(tracked, tmp_path):
    rows = Rows(tracked())
    rows.write(1, 900)
    rows.start().finish(0)
    (file,) = offline_folders(rows.folder.path)[0].glob("run-*.wandb")
    content = file.read_bytes()
    assert len(content) > 5 * 32768, "too short to have records that cross blocks"
    assert rows_in(file) == 900
    cut = tmp_path / "cut.wandb"
    cut.write_bytes(content[: len(content) // 2])
    count = rows_in(cut)
    assert count is not None and 300 < count < 600
    cut.write_bytes(b"")
    assert rows_in(cut) == 0
    cut.write_bytes(b"another format")
    assert rows_in(cut) is None
