"""`llama-lab watch` beside a process that writes as a run does, and beside ones that are gone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_lab.cli import main
from llama_lab.lab.runs.watch import spark

from .written_runs import Make

Output = pytest.CaptureFixture[str]

# Holds a run as training does, writes rows when it is told to, and ends it.
TRAINER = """
import json, sys, time
from pathlib import Path
from llama_lab.training.run_folder import RunFolder, hold_run
folder = Path(sys.argv[1])
with hold_run(folder):
    RunFolder(folder).write_summary(status="running", error=None, update=4, tokens=2048)
    print("runs", flush=True)
    for number, line in enumerate(sys.stdin, start=5):
        row = {"update": number, "tokens": number * 512, "seconds": number * 0.5, "train/loss": 3.0 - number / 10}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\\n")
        RunFolder(folder).write_summary(**row, **{"speed/tokens_per_second": 1024.0})
        print("written", flush=True)
    RunFolder(folder).write_summary(status="finished", tokens=10240)
"""


@pytest.fixture
def trainer(make: Make):
    """A run, and a process that holds it."""
    folder = make(0, last=4)
    words = [sys.executable, "-c", TRAINER, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        yield folder, process
        process.kill()


def write_row(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "written\n"


def test_one_look_shows_how_far_and_how_fast(trainer, capsys: Output):
    folder, process = trainer
    for _ in range(3):
        write_row(process)
    assert main(["watch", "--once"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("1 of 1 run training")
    # 7 of 20 updates, and 13 more at half a second each.
    assert {"running", "35", "6.5s", "2.3000", "█▅▁", "1,024"} <= set(shown.split())
    assert folder.name in shown


def test_it_ends_with_the_last_run_and_says_which_are_dead(trainer, make: Make, capsys: Output):
    folder, process = trainer
    dead = make(1, status="running", last=8)
    failed = make(2, status="failed", last=8)
    (failed / "summary.json").write_text(
        json.dumps({"status": "failed", "error": "Diverged: loss is nan\ntrace"}), encoding="utf-8"
    )
    words = [sys.executable, "-m", "llama_lab", "watch", str(folder.parent), "--every", "0.05"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        first = [watching.stdout.readline() for _ in range(5)]
        assert first[0] == "1 of 3 runs training\n"
        assert process.stdin is not None
        process.stdin.close()
        rest = watching.stdout.read()
        assert watching.wait(30) == 1
    assert "0 of 3 runs training" in rest
    assert "finished" in rest
    assert f"{dead.name} is dead: it says that it runs, but its process is gone" in rest
    assert f"{failed.name} failed: Diverged: loss is nan\n" in rest


# Where a shell without job control has put the tests into the background, what they start would ignore SIGINT.
HEARS_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"

WATCH = HEARS_SIGINT + "import sys; from llama_lab.cli import main; sys.exit(main(['watch', '--every', '30']))"

# What another thread takes does not wake this one, just as what comes in the moment before a sleep begins.
SIGNAL_WITHOUT_WAKING = (
    HEARS_SIGINT
    + """
import threading, time
from llama_lab.lab.runs.watch import wait

def send():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

try:
    threading.Thread(target=send, daemon=True).start()
    wait(600)
    print("nothing came")
except KeyboardInterrupt:
    print("interrupted")
"""
)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a thread")
def test_ctrl_c_just_before_a_sleep_is_not_lost():
    words = [sys.executable, "-c", SIGNAL_WITHOUT_WAKING]
    assert subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout == "interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_ctrl_c_ends_it_without_a_traceback(trainer):
    _, process = trainer
    words = [sys.executable, "-c", WATCH]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None and watching.stderr is not None
        assert watching.stdout.readline() == "1 of 1 run training\n"
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0
        assert "what trains goes on" in watching.stdout.read()
        assert watching.stderr.read() == ""
    assert process.poll() is None


def test_nothing_that_trains_is_said(make: Make, capsys: Output):
    make()
    assert main(["watch"]) == 0
    assert "No run is training in" in capsys.readouterr().out
    assert main(["watch", "nowhere"]) == 2
    assert "nowhere names no run" in capsys.readouterr().err


def test_a_spark_line_shows_values_and_what_is_none():
    assert spark([1.0, 2.0, None, 3.0]) == "▁▅×█"
    assert spark([2.0, 2.0]) == "▁▁"
    assert spark([]) == ""
    assert len(spark([float(number) for number in range(100)])) == 16


def test_a_run_that_is_gone_while_it_is_watched_is_left_out(trainer, tmp_path: Path):
    folder, process = trainer
    words = [sys.executable, "-m", "llama_lab", "watch", str(folder), "--every", "0.05"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None and watching.stderr is not None
        assert watching.stdout.readline() == "1 of 1 run training\n"
        process.kill()
        process.wait()
        folder.rename(tmp_path / "moved")
        assert watching.wait(30) == 0
        assert watching.stderr.read() == ""
