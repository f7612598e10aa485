"""How long a report of many long runs takes, and how large it is.

    python tests/lab/time_report.py --runs 50 --points 2000

Every run has a config of its own, which is harder than seeds of a few. 10 s and 5 MB are allowed, from the command to its end; exit
code 1 says that one is exceeded. With --seeds 5 they are ten arms of five seeds.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from long_runs import write_long_run

from llama_lab import compose
from llama_lab.config.resolve import resolve

MOST_SECONDS, MOST_MB = 10.0, 5.0


def main() -> int:
    """Time as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="runs (50)")
    parser.add_argument("--points", type=int, default=2000, help="rows of training metrics of each (2000)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each config (1)")
    parser.add_argument("--keep", type=Path, help="folder to write runs and report to; else they are removed again")
    asked = parser.parse_args()
    base = resolve(compose(["experiment=smoke", "hardware=cpu", "precision=fp32"]))
    with contextlib.nullcontext(asked.keep) if asked.keep else tempfile.TemporaryDirectory(prefix="time_report-") as name:
        study = Path(name) / "outputs" / "study"
        for number in range(asked.runs):
            arm, seed = divmod(number, asked.seeds)
            lr = 1e-3 * 1.05**arm
            final = 2.5 + 0.01 * arm + 0.003 * ((7 * number) % 5)
            write_long_run(base, study / f"run-{number:03}", seed=seed, lr=lr, points=asked.points, final=final)
        start = time.monotonic()
        command = [sys.executable, "-m", "llama_lab", "report", str(study), "--out", str(study / "report")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = time.monotonic() - start
        size = (study / "report" / "report.html").stat().st_size / 1e6
    print(f"{asked.runs} runs x {asked.points} points: {seconds:.1f} s, at most {MOST_SECONDS:.0f}")
    print(f"report.html: {size:.2f} MB, at most {MOST_MB:.0f}")
    return 0 if seconds <= MOST_SECONDS and size <= MOST_MB else 1


if __name__ == "__main__":
    sys.exit(main())
