"""How fast a config trains here, measured in the loop that trains it.

A config is trained for some updates by the command that trains anything, in a process of its own, without validation, samples,
tracker and checkpoints. What is said is the median over the rows of the log once the first updates are done.
"""

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_lab.config.compose import compose
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import RunConfig
from llama_lab.data.prepare import prepare
from llama_lab.model.count import flops_per_token, parameters
from llama_lab.training.metrics import read_rows
from llama_lab.training.run_folder import RunFolder

WARM = 10
"""First updates that are not counted: kernels are compiled, memory is allocated, clocks settle."""
EVERY = 5
DEFAULT = "(the default)"
PARTS = ("forward", "backward", "exchange", "optimizer", "rest")
FORCED = [
    *("wandb=null", "eval=null", "sample=null", "checkpoint.every_tokens=null", "checkpoint.keep_every_tokens=null"),
    *("checkpoint.at_end=false", f"log.every_updates={EVERY}", "log.parts=true", "schedule=constant", "schedule.warmup_updates=10"),
]


@dataclass
class Bench:
    """What was measured of one config.

    Attributes:
        config: the words that chose it.
        tokens_per_second: of all processes, median over rows.
        spread: half of the range between the rows' quartiles, as a share of the median.
        mfu: share of the bf16 peak; null where that is not known.
        parts: share of the device's time by part; `data` is the share in which the host waited for data.
        first_update_seconds: from the start of training to the end of the first update, compiling included.
        loss: mean over the last row, in nats: that it was real training.
        error: why there is nothing to say.
    """

    config: str
    device: str = ""
    torch: str = ""
    precision: str = ""
    processes: int = 1
    micro_batch: int = 0
    tokens_per_update: int = 0
    parameters: int = 0
    flops_per_token: int = 0
    updates: int = 0
    tokens_per_second: float = 0.0
    spread: float = 0.0
    mfu: float | None = None
    peak_gib: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    first_update_seconds: float = 0.0
    loss: float | None = None
    error: str = ""


def measure(overrides: list[str], updates: int, *, config_dir: Path | None = None) -> Bench:
    """Train a config for some updates, and say how fast that went.

    Args:
        overrides: as typed behind `llama-lab train`.
        config_dir: a folder with more options and presets.
    """
    forced = forced_words(overrides)
    run = resolve(compose([*overrides, *forced], config_dir=config_dir))
    forced.append(f"training_tokens={updates * run.data.tokens_per_update}")
    bench = Bench(said_of(overrides), precision=run.precision.value, updates=updates)
    with tempfile.TemporaryDirectory(prefix="llama_lab-bench-") as outputs:
        own = [] if config_dir is None else [f"--config-dir={config_dir}"]
        words = [sys.executable, "-m", "llama_lab", "train", *overrides, *forced, "name=bench", *own]
        done = subprocess.run(words, env=os.environ | {"LLAMA_LAB_OUTPUTS": outputs}, capture_output=True, text=True, check=False)
        folders = [path.parent for path in Path(outputs).glob("bench/*/config.yaml")]
        rows = [row for folder in folders for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
        if done.returncode or len(folders) != 1:
            bench.error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return bench
        _fill(bench, run, rows, RunFolder(folders[0]).meta())
    return bench


def _fill(bench: Bench, run: RunConfig, rows: list[dict[str, Any]], meta: dict[str, Any]) -> None:
    """Put what a run has measured, and what it was, into its place."""
    bench.device, bench.torch = meta["machine"]["processor"], meta["versions"]["torch"]
    bench.processes = run.hardware.processes or 1
    bench.micro_batch = run.hardware.micro_batch if isinstance(run.hardware.micro_batch, int) else 0
    bench.tokens_per_update = run.data.tokens_per_update
    vocab_size = prepare(run.data, run.tokenizer, lambda text: None).tokenizer.vocab_size
    bench.parameters = parameters(run.model, vocab_size)
    bench.flops_per_token = flops_per_token(run.model, vocab_size, run.data.max_seq_len)
    steady = [row for row in rows if row["update"] > WARM]
    speeds = sorted(row["speed/tokens_per_second"] for row in steady)
    bench.tokens_per_second = statistics.median(speeds)
    if len(speeds) >= 4:
        low, _, high = statistics.quantiles(speeds, n=4)
        bench.spread = (high - low) / 2 / bench.tokens_per_second
    shares = {part: f"speed/{part}" for part in PARTS} | {"data": "speed/data_wait"}
    bench.parts = {part: statistics.mean(row.get(key, 0.0) for row in steady) for part, key in shares.items()}
    known = [row["speed/mfu"] for row in steady if "speed/mfu" in row]
    bench.mfu = statistics.median(known) if known else None
    bench.peak_gib = max(row["memory/peak_gib"] for row in rows)
    bench.first_update_seconds = rows[0]["seconds"]
    bench.loss = steady[-1]["train/loss"]


def told_apart(configs: Sequence[str]) -> tuple[str, list[str]]:
    """The words that all configs have, and of each what is left: of a single one nothing.

    Args:
        configs: as `Bench.config` has them.
    """
    words = [[config] if config == DEFAULT else shlex.split(config) for config in configs]
    shared = [word for word in words[0] if all(word in others for others in words)]
    own = [[word for word in some if word not in shared] for some in words]
    return shared[0] if shared == [DEFAULT] else shlex.join(shared), [shlex.join(some) for some in own]


def said_of(overrides: Sequence[str]) -> str:
    """A config in one line, as it can be typed."""
    return shlex.join(overrides) or DEFAULT


def forced_words(overrides: list[str]) -> list[str]:
    """What bench sets, but for what was typed. A preset keeps its schedule: it may set values that no other has."""
    typed = {word.partition("=")[0] for word in overrides}
    typed |= {"schedule"} if "experiment" in typed else set()
    return [word for word in FORCED if word.partition("=")[0] not in typed]
