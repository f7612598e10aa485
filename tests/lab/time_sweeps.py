"""How well a sweep packs the cores, and what starting a job costs: to be run on a machine that does nothing else.

    python tests/lab/time_sweeps.py --jobs 8 --seconds 60

Jobs of one thread that train for about so long, on the two cores that this process keeps to. Packed, the sweep may take 1.1 times
the seconds that its jobs spend in their processes, divided by the cores; one after another, 5 s a job beside its updates, with
everything counted from the command to its end. Both are printed, and exit code 1 says that one is exceeded. --seconds 5 is a quick
look.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kill_sweeps import write_text

CORES = 2
MOST = 1.1
MOST_SECONDS = 5.0
TRIED_UPDATES = 300


def main() -> int:
    """Time as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8, help="jobs of the sweep that is packed (8)")
    parser.add_argument("--seconds", type=float, default=60.0, help="that each of them trains for, about (60)")
    asked = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory(prefix="time_sweeps-") as name:
        folder = Path(name)
        write_text(folder)
        # The first sweep prepares the text and says how long an update takes with both cores busy.
        tried = _sweep(folder, "tried", jobs=CORES, updates=TRIED_UPDATES, at_once=CORES)
        updates = max(10, round(TRIED_UPDATES * asked.seconds * CORES / sum(tried["inside"])))
        alone = _sweep(folder, "alone", jobs=3, updates=20, at_once=1)
        packed = _sweep(folder, "packed", jobs=asked.jobs, updates=updates, at_once=CORES)
    # Three jobs share what the sweep itself takes to start, as few as any sweep worth typing has.
    overhead = (alone["wall"] - sum(alone["training"])) / len(alone["training"])
    ratio = packed["wall"] / (sum(packed["inside"]) / CORES)
    print(f"one after another: {overhead:.1f} s a job beside training, at most {MOST_SECONDS:.0f}")
    inside = ", ".join(f"{seconds:.1f}" for seconds in packed["inside"])
    print(
        f"{asked.jobs} jobs on {CORES} cores: {packed['wall']:.1f} s; in the jobs {inside} s; "
        f"{ratio:.3f} of the ideal, at most {MOST}"
    )
    return 0 if overhead <= MOST_SECONDS and ratio <= MOST else 1


def _sweep(folder: Path, name: str, *, jobs: int, updates: int, at_once: int) -> dict[str, Any]:
    """Run a sweep: seconds from its command to its end, in the process of each job, and of these in its updates."""
    science = "precision=fp32 tokenizer=bytes model.dim=64 model.n_layers=2 model.n_heads=2 model.multiple_of=32"
    batch = "data=text data.max_seq_len=64 data.tokens_per_update=2048 hardware=cpu wandb=null sample=null"
    watching = f"log.every_updates=50 eval.every_updates=null eval.max_tokens=500 checkpoint.every_tokens=null name={name}"
    budget = f"training_tokens={updates * 2048} schedule.warmup_updates=5 seed.init=range({jobs}) sweep.at_once={at_once}"
    words = [*science.split(), *batch.split(), *watching.split(), *budget.split(), f"data.path={folder / 'text.jsonl'}"]
    own = {"LLAMA_LAB_OUTPUTS": str(folder / "outputs"), "LLAMA_LAB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "llama_lab", "train", "-m", *words],
        env=os.environ | own,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall = time.monotonic() - start
    paths = sorted((folder / "outputs" / name / "sweeps").glob("*/jobs/*/outcome.json"))
    outcomes = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    assert len(outcomes) == jobs
    inside = [outcome["process_seconds"] for outcome in outcomes]
    return {"wall": wall, "inside": inside, "training": [outcome["summary"]["seconds"] for outcome in outcomes]}


if __name__ == "__main__":
    sys.exit(main())
