"""Kill a sweep at random moments with SIGKILL, type it again, and look whether it ends complete and nothing was done twice.

    python tests/lab/kill_sweeps.py --jobs 24 --kills 3

Small runs on the CPU. In turn only the sweep's own process is killed, whose jobs then save and end by themselves, and everything
that it has started at once. At the end every run has to be finished and whole, and those that were finished at a kill have to be
untouched since.

Exits with 1 if anything is wrong. Linux only; --folder keeps everything that it writes.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab.config.identity import load_config
from llama_lab.lab.repeat.checks import check_checkpoints, check_identity, check_rows
from llama_lab.lab.repeat.rows import Rows
from llama_lab.training.run_folder import RunFolder

POLL_SECONDS = 0.02
START_SECONDS = 300.0
LATER_SECONDS = 1.5
"""A kill follows a run's end by up to so long."""


@dataclass(frozen=True)
class Bench:
    """Where a sweep is made, and from what.

    Attributes:
        folder: holds the text, the cache and the outputs.
        jobs: of the sweep.
        updates: of each run.
    """

    folder: Path
    jobs: int
    updates: int = 60

    def command(self, *more: str) -> list[str]:
        """What is typed."""
        science = "precision=fp32 tokenizer=bytes model.dim=32 model.n_layers=2 model.n_heads=2 model.multiple_of=32"
        batch = "data=text data.max_seq_len=32 data.tokens_per_update=512 hardware=cpu"
        budget = f"training_tokens={self.updates * 512} schedule.warmup_updates=5 schedule.cooldown_fraction=0.5"
        watching = "log.every_updates=1 eval.every_updates=20 eval.max_tokens=500 sample=null checkpoint.every_tokens=2560"
        words = f"name=killed {science} {batch} {budget} {watching} wandb=null data.path={self.folder / 'text.jsonl'}"
        return [sys.executable, "-m", "llama_lab", "train", "-m", *words.split(), f"seed.init=range({self.jobs})", *more]

    def start(self, *more: str) -> "subprocess.Popen[bytes]":
        """Type it, in a process group of its own."""
        own = {
            "LLAMA_LAB_OUTPUTS": str(self.folder / "outputs"),
            "LLAMA_LAB_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / "sweep.log").open("ab") as log:
            return subprocess.Popen(
                self.command(*more), stdout=log, stderr=log, env=os.environ | own, cwd=self.folder, start_new_session=True
            )

    @property
    def runs(self) -> list[RunFolder]:
        """The runs that have begun."""
        return [RunFolder(path.parent) for path in (self.folder / "outputs" / "killed").glob("*/meta.json")]

    def rows(self) -> list[dict[str, str]]:
        """summary.csv."""
        (path,) = (self.folder / "outputs" / "killed" / "sweeps").glob("*/summary.csv")
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


def write_text(folder: Path) -> None:
    """A few documents of few words."""
    draw = random.Random(0)
    words = ["the", "a", "model", "learns", "reads", "text", "loss", "token", "batch", "gradient", "slowly", "again", "never"]
    documents = [" ".join(draw.choices(words, k=draw.randint(3, 120))) + "." for _ in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def survive(bench: Bench, *, kills: int, seed: int) -> list[str]:
    """Run the sweep with so many kills; what is wrong in the end."""
    draw, wrong = random.Random(seed), []
    moments = sorted(draw.sample(range(bench.jobs), kills))
    untouched: dict[Path, Any] = {}
    for number, finished in enumerate(moments):
        process = bench.start()
        _wait_for(bench, finished, process)
        time.sleep(draw.uniform(0, LATER_SECONDS))
        everything = number % 2 == 1
        victims = [process.pid, *(_descendants(process.pid) if everything else [])]
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        process.wait()
        untouched |= {run.path: _state(run) for run in bench.runs if run.finished}
        print(f"killed {'everything' if everything else 'the sweep alone'} with {len(untouched)} runs finished", flush=True)
    last = bench.start()
    code = last.wait(timeout=START_SECONDS * bench.jobs)
    if code != 0:
        wrong.append(f"the last start ended with exit code {code}; see {bench.folder / 'sweep.log'}")
    statuses = [row["status"] for row in bench.rows()]
    if len(statuses) != bench.jobs or not set(statuses) <= {"finished", "already finished"}:
        wrong.append(f"summary.csv says {statuses}")
    if len(bench.runs) != bench.jobs:
        wrong.append(f"there are {len(bench.runs)} runs")
    wrong += [f"{path.name} was finished and is changed" for path, state in untouched.items() if _state(RunFolder(path)) != state]
    return wrong + [problem for run in bench.runs for problem in _broken(run)]


def _broken(run: RunFolder) -> list[str]:
    """What is not whole of a finished run."""
    config, rows = load_config(run.path / "config.yaml"), Rows.of(run)
    checks = [check_identity(config, run), check_rows(config, run, rows), check_checkpoints(run)]
    wrong = [f"{run.path.name}: {check.name}: {check.said}" for check in checks if not check.passed]
    wrong += [f"{run.path.name} holds {draft.name}" for draft in run.path.glob(".*.draft")]
    missing = {"config.yaml", "meta.json", "metrics.jsonl", "summary.json", "train.log", "plots", "tokenizer.json"}
    wrong += [f"{run.path.name} lacks {name}" for name in missing if not (run.path / name).exists()]
    return wrong


def _state(run: RunFolder) -> Any:
    """What must not change once a run is finished."""
    files = sorted(path for path in run.path.rglob("*") if path.is_file())
    # The last lines and the pictures come after the run is done, and may be made later than a kill.
    files = [path for path in files if path.name != "train.log" and path.parent.name != "plots"]
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]


def _wait_for(bench: Bench, finished: int, process: "subprocess.Popen[bytes]") -> None:
    """Until so many runs are finished, or the sweep has ended."""
    deadline = time.monotonic() + START_SECONDS
    while sum(run.finished for run in bench.runs) < finished and process.poll() is None:
        assert time.monotonic() < deadline, "timed out"
        time.sleep(POLL_SECONDS)


def _descendants(process: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_descendants(child)]
    return found


def main() -> int:
    """Kill as the command line asks, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=24, help="jobs of the sweep (24)")
    parser.add_argument("--kills", type=int, default=3, help="times that it is killed (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--folder", type=Path, help="a new folder for everything; by default it is removed at the end")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kill_sweeps-")))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder)
        wrong = survive(Bench(folder.absolute(), asked.jobs), kills=asked.kills, seed=asked.seed)
    print("\n".join(wrong) if wrong else f"{asked.jobs} runs finished and whole after {asked.kills} kills, none done twice")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
