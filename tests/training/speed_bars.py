"""Speed on CUDA devices against what is promised: to be run on machines that do nothing else.

    llama-lab prepare data=text data.path=TEXTS tokenizer=bpe --out DIR          # real text, for losses that mean something
    python tests/training/speed_bars.py loop --data DIR                          # the loop, and bare updates beside it; one GPU
    python tests/training/speed_bars.py pair --data DIR                          # two GPUs against one; a kill, a resume on one
    python tests/training/speed_bars.py fp8 --data DIR --seeds 0 1               # validation loss in float8 beside bfloat16's
    python tests/training/speed_bars.py options --data DIR                       # what recomputation and bfloat16 moments cost

The loop is `llama-lab train`, its log included; speeds are medians over the rows after the first updates. Bare is the same compiled
update on batches that lie on the device already: no stream, no log, no guard. Exit code 1 says that a bar is missed.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from llama_lab import compose
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import RunConfig
from llama_lab.data.prepare import prepare
from llama_lab.data.stream import Batch, training_stream
from llama_lab.lab.compare.statistics import estimate_difference
from llama_lab.training.feed import Feed, MicroBatch
from llama_lab.training.loop import build
from llama_lab.training.metrics import read_rows
from llama_lab.training.processes.worker import Place, Worker, join
from llama_lab.training.update import Updater

TOKENS, TOKENS_OF_TWO = 131_072, 262_144
WARM = 8
"""First updates that are not counted: kernels are compiled, memory is allocated, clocks settle."""
LOOP_COST, OF_TWO = 0.01, 1.95
MODELS = {
    "llama_97m": "model=llama_97m",
    "seed_1b": "model=seed_1b hardware.micro_batch=8",
    "seed_1b, fp8": "model=seed_1b hardware.micro_batch=8 precision=fp8",
}
SPEEDS = {"llama_97m": 615_000, "seed_1b": 64_000, "seed_1b, fp8": 82_000}
"""Tokens a second that an H100 80GB is promised to reach."""
UPDATES = {"llama_97m": 40, "seed_1b": 20, "seed_1b, fp8": 20}
QUIET = "wandb=null sample=null eval=null checkpoint.every_tokens=null checkpoint.at_end=false"
SMOOTH = "schedule.warmup_updates=100"
"""For runs whose curves are compared: at the full rate so early, gradients leap, and what differs in rounding alone comes apart."""
PRECISIONS = ("bf16", "fp8")
OPTIONS = {
    "as it is": "",
    "hardware.recompute=selective": "hardware.recompute=selective",
    "hardware.recompute=full": "hardware.recompute=full",
    "optim.state_dtype=bf16": "optim.state_dtype=bf16",
    "optim=muon": "optim=muon",
    "hardware.deterministic=true": "hardware.deterministic=true",
}


@dataclass
class Runs:
    """Where runs are made, and from what.

    Attributes:
        folder: holds their outputs.
        data: a prepared set, with its tokenizer.
        words: further words of every command.
        missed: bars.
    """

    folder: Path
    data: Path
    words: list[str]
    missed: list[str] = field(default_factory=list)

    def overrides(self, text: str) -> list[str]:
        """What is typed for a run. A word replaces an earlier one of the same key, and one that leaves out the whole part."""
        usual = f"data=shards data.path={self.data} tokenizer=file tokenizer.path={self.data / 'tokenizer.json'}"
        usual += (
            f" data.tokens_per_update={TOKENS} {QUIET} schedule=constant schedule.warmup_updates=5 optim=adamw optim.max_lr=6e-4"
        )
        words = [*usual.split(), *text.split(), *self.words]
        chosen = {word.partition("=")[0]: word for word in words}
        wanted = {key.partition(".")[0] for key in chosen if "." in key}
        return [word for key, word in chosen.items() if not (key in wanted and word.endswith("=null"))]

    def start(self, name: str, text: str) -> "subprocess.Popen[bytes]":
        """Start a run, in a process group of its own."""
        command = [sys.executable, "-m", "llama_lab", "train", *self.overrides(text), f"name={name}"]
        own = os.environ | {"LLAMA_LAB_OUTPUTS": str(self.folder)}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=own, start_new_session=True)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What the run's log holds so far."""
        paths = list(self.folder.glob(f"{name}/*/metrics.jsonl"))
        return read_rows(paths[0]) if paths else []

    def finished(self, name: str, process: "subprocess.Popen[bytes]") -> list[dict[str, Any]]:
        """Its rows, once it has ended well."""
        if (code := process.wait()) != 0:
            said = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"{name} ended with {code}:\n{said[-3000:]}")
        return self.rows(name)

    def train(self, name: str, text: str) -> list[dict[str, Any]]:
        """Train a run, and return its rows."""
        return self.finished(name, self.start(name, text))

    def hold(self, kept: bool, bar: str) -> str:
        """Note whether a bar is kept; a word about it for the table."""
        if not kept:
            self.missed.append(bar)
        return "" if kept else "  MISSED"


def main() -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loop", "pair", "fp8", "options", "bare"])
    parser.add_argument("--data", type=Path, required=True, help="folder that llama-lab prepare has written")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the runs in float8 and bfloat16 (0 1)")
    parser.add_argument("--options", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), help="only these")
    parser.add_argument("--folder", type=Path, help="keep the runs' folders here")
    parser.add_argument("words", nargs="*", help="further overrides of every run")
    asked = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="speed_bars-") as temporary:
        runs = Runs((asked.folder or Path(temporary)).resolve(), asked.data.resolve(), asked.words)
        runs.folder.mkdir(parents=True, exist_ok=True)
        match asked.what:
            case "loop":
                loop(runs, asked.models or list(MODELS))
            case "pair":
                pair(runs, asked.models or ["llama_97m", "seed_1b"])
            case "fp8":
                fp8(runs, asked.seeds)
            case "options":
                options(runs, asked.models or ["llama_97m"], asked.options)
            case "bare":
                print(json.dumps(bare(runs, asked.models[0])))
                return 0
    print("missed: " + ", ".join(runs.missed) if runs.missed else "every bar is kept")
    return 1 if runs.missed else 0


def loop(runs: Runs, models: list[str]) -> None:
    """The loop's speed and memory, and what it costs over bare updates."""
    is_h100 = "H100 80GB" in device_name()
    print(f"{device_name()}, torch {torch.__version__}: tokens a second, medians")
    print(f"{'':16}{'loop':>9}{'bare':>9}{'cost':>8}{'peak GiB':>10}{'first':>8}  losses")
    for name in models:
        text = f"{MODELS[name]} training_tokens={UPDATES[name] * TOKENS} log.every_updates=4"
        rows = runs.train(f"loop-{slug(name)}", text)
        plain = bare_elsewhere(runs, name)
        speed = steady(rows)
        cost = plain / speed - 1
        bars = runs.hold(cost <= LOOP_COST, f"cost of the loop, {name}")
        if is_h100:
            bars += runs.hold(speed >= SPEEDS[name], f"speed, {name}")
        print(
            f"{name:16}{speed:9,.0f}{plain:9,.0f}{cost:+8.1%}{peak(rows):10.2f}{rows[0]['seconds']:7.1f}s  {losses(rows)}{bars}",
            flush=True,
        )


def pair(runs: Runs, models: list[str]) -> None:
    """Two GPUs against one, the same tokens an update on both sides; then a kill of two and a resume on one."""
    print(f"{device_name()}, {TOKENS_OF_TWO:,} tokens an update: tokens a second, medians")
    print(f"{'':16}{'one GPU':>9}{'two':>11}{'times':>8}{'losses apart':>14}  losses of two")
    for name in models:
        count = UPDATES[name] * 2
        text = f"{MODELS[name]} data.tokens_per_update={TOKENS_OF_TWO} training_tokens={count * TOKENS} "
        text += f"log.every_updates=2 {SMOOTH}"
        one, two = (runs.train(f"on{number}-{slug(name)}", f"{text} hardware.processes={number}") for number in (1, 2))
        times = steady(two) / steady(one)
        bars = runs.hold(times >= OF_TWO, f"two GPUs, {name}")
        print(
            f"{name:16}{steady(one):9,.0f}{steady(two):11,.0f}{times:8.3f}{apart(one, two):14.2e}  {losses(two)}{bars}", flush=True
        )
    survive(runs)


def survive(runs: Runs) -> None:
    """Kill a run on two GPUs with SIGKILL, and let one GPU go on with it."""
    text = f"{MODELS['llama_97m']} data.tokens_per_update={TOKENS_OF_TWO} training_tokens={24 * TOKENS_OF_TWO} "
    text += f"log.every_updates=1 {SMOOTH}"
    saving = f"{text} checkpoint.every_tokens={8 * TOKENS_OF_TWO}"
    unbroken = runs.train("unbroken", f"{text} hardware.processes=2")
    victim = runs.start("killed", f"{saving} hardware.processes=2")
    while victim.poll() is None and not any(row["update"] >= 12 for row in runs.rows("killed")):
        time.sleep(0.1)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    left = max(row["update"] for row in runs.rows("killed"))
    rows = runs.train("killed", f"{saving} hardware.processes=1")
    same = [row["update"] for row in rows] == [row["update"] for row in unbroken]
    off = apart(unbroken, rows)
    bars = runs.hold(same and left < 24 and off < 0.01, "a kill and a resume on one GPU")
    print(f"killed on two GPUs after update {left}, went on on one to update {rows[-1]['update']}; losses apart {off:.2e}{bars}")


def fp8(runs: Runs, seeds: list[int]) -> None:
    """Validation loss after 15M tokens, a precision a GPU where there are two; with the interval of the paired difference."""
    text = (
        "model=seed_1b hardware.micro_batch=8 training_tokens=15728640 schedule=wsd eval.every_updates=60 eval.max_tokens=1000000"
    )
    text += " log.every_updates=10 schedule.warmup_updates=30"
    text += " optim.max_lr=3e-4"  # at 6e-4 two runs that differ in rounding alone end 0.1 nats apart after so few tokens
    found: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    devices = max(1, torch.cuda.device_count())  # before CUDA_VISIBLE_DEVICES hides some of them from this process as well
    for seed in seeds:
        started = {}
        for number, precision in enumerate(found):
            os.environ["CUDA_VISIBLE_DEVICES"] = str(number % devices)
            started[precision] = runs.start(
                f"{precision}-{seed}", f"{text} precision={precision} seed.init={seed} seed.data={seed}"
            )
            if devices < len(found):
                started[precision].wait()
        for precision, process in started.items():
            rows = runs.finished(f"{precision}-{seed}", process)
            found[precision].append([row["val/loss"] for row in rows if "val/loss" in row][-1])
            print(
                f"seed {seed}, {precision}: validation loss {found[precision][-1]:.4f}; {steady(rows):,.0f} tokens a second",
                flush=True,
            )
    if len(seeds) > 1:
        difference = estimate_difference(np.array(found["bf16"]), np.array(found["fp8"]), paired=True)
        print(
            f"fp8 - bf16: {difference.effect:+.4f} nats, 95 % interval {difference.low:+.4f} to {difference.high:+.4f}, "
            f"{len(seeds)} pairs of seeds"
        )


def options(runs: Runs, models: list[str], chosen: list[str]) -> None:
    """Speed and memory of a model with an option each."""
    print(f"{device_name()}: tokens a second, medians")
    for name, option in itertools.product(models, chosen):
        text = f"{MODELS[name]} training_tokens={UPDATES[name] * TOKENS} log.every_updates=4 {OPTIONS[option]}"
        rows = runs.train(f"option-{slug(name)}-{slug(option)}", text)
        print(f"{name:16}{option:32}{steady(rows):9,.0f}{peak(rows):10.2f} GiB  {losses(rows)}", flush=True)


def bare_elsewhere(runs: Runs, name: str) -> float:
    """Speed of bare updates, in a process of its own: this one must not hold any of the device's memory."""
    command = [sys.executable, __file__, "bare", "--data", str(runs.data), "--models", name, "--", *runs.words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bare updates of {name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def bare(runs: Runs, name: str) -> float:
    """Tokens a second of the compiled update alone, the median over groups of four updates."""
    run = resolve(compose(runs.overrides(f"{MODELS[name]} training_tokens={UPDATES[name] * TOKENS}")))
    data = prepare(run.data, run.tokenizer, lambda said: None)
    seconds = []
    with join(run.hardware, Place()) as worker:
        model, optimizer = build(run, data, worker)
        feed = cast(Feed, Resident(run, worker, training_stream(run, data)))
        with Updater(model, run, worker) as updater:
            start = time.perf_counter()
            for update in range(1, run.updates + 1):
                gradients = updater.gradients(feed, update)
                updater.step(optimizer, update, unless=gradients.is_bad)
                if update % 4 == 0:
                    worker.synchronise()
                    now = time.perf_counter()
                    seconds.append(now - start)
                    start = now
    return 4 * run.data.tokens_per_update / statistics.median(seconds[WARM // 4 :])


class Resident:
    """The same windows for every update, on the device: what `Feed` gives, without reading anything."""

    def __init__(self, run: RunConfig, worker: Worker, stream: Any) -> None:
        with Feed(stream, run, worker, first_update=1, last_update=1) as feed:
            self._parts = [self._moved(part, worker) for part in feed.update()]

    def _moved(self, part: MicroBatch, worker: Worker) -> MicroBatch:
        tokens, targets = part.batch.tokens.to(worker.device), part.batch.targets.to(worker.device)
        return MicroBatch(Batch(tokens, targets, None), part.predicted, part.update_predicted, part.hash, part.is_last)

    def update(self) -> Iterator[MicroBatch]:
        return iter(self._parts)


def steady(rows: list[dict[str, Any]]) -> float:
    """Tokens a second, the median over rows."""
    return statistics.median(row["speed/tokens_per_second"] for row in rows if row["update"] > WARM and "train/loss" in row)


def peak(rows: list[dict[str, Any]]) -> float:
    return max(row["memory/peak_gib"] for row in rows if "memory/peak_gib" in row)


def losses(rows: list[dict[str, Any]]) -> str:
    trained = [row for row in rows if "train/loss" in row]
    chosen = {row["update"]: row["train/loss"] for row in (trained[0], trained[len(trained) // 2], trained[-1])}
    return ", ".join(f"{loss:.3f} at {update}" for update, loss in chosen.items())


def apart(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Largest difference between losses of the same update."""
    by_update = {row["update"]: row["train/loss"] for row in others if "train/loss" in row}
    return max(abs(row["train/loss"] - by_update[row["update"]]) for row in rows if row["update"] in by_update)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


if __name__ == "__main__":
    sys.exit(main())
