"""How well `llama-lab plan` foresees peak memory and time: to be run on a machine that does nothing else.

    python tests/lab/plan_bars.py                          what this machine has, a GPU or its CPU
    python tests/lab/plan_bars.py --only memory --at-once 4
    python tests/lab/plan_bars.py --only time --seconds 30

Memory, on a GPU alone: a few updates of each config, several at once, since what one process allocates does not depend on others.
What the formula said before the first update is held against what torch's allocator says at the end; 10 % is allowed. Time: each
config is probed, and then trained for about so many seconds; what the probe foresaw is held against what the run took from the
moment that its data was ready, and may be off by 10 % on a GPU and by 20 % on a CPU. Exit code 1 says that a bar is missed.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llama_lab.config.compose import compose
from llama_lab.config.devices import probe_cuda
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import RunConfig
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.lab.probe import probe
from llama_lab.training.foresight.forecast import foresee
from llama_lab.training.metrics import read_rows

MEMORY_BAR, GPU_TIME_BAR, CPU_TIME_BAR = 0.10, 0.10, 0.20
DOCUMENTS, WORDS, LETTERS = 6000, 8000, "etaoinshrdlu"

GPU = "hardware=gpu precision=bf16 data.max_seq_len=2048 data.tokens_per_update=65536"
QUIET = "eval=null sample=null checkpoint.every_tokens=null checkpoint.at_end=false"
SHALLOW = "model=llama_97m model.n_layers=6"
MEMORY = {
    "llama_97m, 16 windows": "model=llama_97m hardware.micro_batch=16 optim=adamw",
    "shared keys, muon": f"{SHALLOW} model.dim=1024 model.n_heads=16 model.n_kv_heads=4 hardware.micro_batch=8 optim=muon",
    "wide, 1 window, muon": f"{SHALLOW} model.dim=2048 model.n_heads=16 hardware.micro_batch=1 optim=muon",
    "vocabulary of 32,768, tied": f"{SHALLOW} model.tie_embeddings=true hardware.micro_batch=8 tokenizer.vocab_size=32768",
    "recompute=selective": f"{SHALLOW} hardware.micro_batch=32 hardware.recompute=selective optim=adamw",
    "moments in bf16": f"{SHALLOW} hardware.micro_batch=4 optim=adamw optim.state_dtype=bf16",
    "recompute=full": f"{SHALLOW} hardware.micro_batch=32 hardware.recompute=full optim=adamw",
    "fp32": f"{SHALLOW} hardware.micro_batch=8 precision=fp32 optim=adamw",
    "fp8": f"{SHALLOW} hardware.micro_batch=16 precision=fp8 optim=adamw",
    "packed, norms of queries": f"{SHALLOW} data.window=packed model.qk_norm=true hardware.micro_batch=8 optim=adamw",
}
LEAST_UPDATES = 20
"""Of a timed run: the schedules' warm-up and decay need room beside each other."""
GPU_TIME = {
    "llama_97m": "model=llama_97m hardware.micro_batch=16 optim=adamw eval.every_updates=40 checkpoint.every_tokens=5000000",
    "small, muon, shared keys": f"{SHALLOW} model.n_kv_heads=4 data.max_seq_len=1024 hardware.micro_batch=32 optim=muon",
    "saved without a pause": f"{SHALLOW} model.n_kv_heads=4 data.max_seq_len=1024 hardware.micro_batch=32 optim=muon "
    "checkpoint.every_tokens=400000",
}
CPU = "hardware=cpu wandb=null precision=fp32"
CPU_TIME = {
    "llama_3m": f"{CPU} eval.every_updates=40 eval.max_tokens=20000",
    "small, adamw, many samples": f"{CPU} model.dim=128 model.n_layers=4 optim=adamw sample.first_tokens=100000 sample.growth=1",
    "long windows, validated often": f"{CPU} model.dim=192 model.n_layers=2 data.max_seq_len=1024 data.tokens_per_update=4096 "
    "eval.every_updates=15 eval.max_tokens=16000 sample=null",
    "tiny, quick updates": f"{CPU} model.dim=64 model.n_layers=2 data.tokens_per_update=2048 tokenizer=bytes eval=null",
    "saved without a pause": f"{CPU} model.dim=512 model.n_layers=4 data.tokens_per_update=256 optim=adamw eval=null sample=null "
    "checkpoint.every_tokens=256",
}


def main() -> int:
    """Measure as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["memory", "time"], help="one of the two bars (both)")
    parser.add_argument("--at-once", type=int, default=3, help="configs whose memory is measured side by side (3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="that each timed run takes, about (60)")
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="only these, in words as the tables have them (all)")
    asked = parser.parse_args()
    cuda = probe_cuda()
    print(f"On {cuda.name or 'a CPU'}", flush=True)
    with tempfile.TemporaryDirectory(prefix="plan_bars-") as name:
        folder = Path(name)
        os.environ |= {"LLAMA_LAB_OUTPUTS": str(folder / "outputs"), "LLAMA_LAB_CACHE": str(folder / "cache")}
        _write_text(folder / "text.jsonl")
        missed = []
        if cuda.devices and asked.only != "time":
            missed += _memory(folder, _chosen(MEMORY, asked.configs), asked.at_once)
        if asked.only != "memory":
            configs = GPU_TIME if cuda.devices else CPU_TIME
            missed += _time(folder, _chosen(configs, asked.configs), asked.seconds, is_gpu=bool(cuda.devices))
    print("missed: " + ", ".join(missed) if missed else "every bar is kept")
    return 1 if missed else 0


def _chosen(configs: dict[str, str], names: list[str] | None) -> dict[str, str]:
    """Those of some names."""
    return configs if names is None else {name: text for name, text in configs.items() if name in names}


def _memory(folder: Path, configs: dict[str, str], at_once: int) -> list[str]:
    """Peak memory of each config, foreseen by the formula and true; names of those that are too far off."""

    def measured(item: tuple[str, str]) -> dict[str, Any]:
        name, text = item
        words = [*_words(folder, f"{GPU} {QUIET} {text}"), "wandb=null", "training_tokens=262144", "schedule.warmup_updates=1"]
        return _trained(folder, name, [*words, "log.every_updates=1"])

    for text in dict.fromkeys(" ".join(word for word in config.split() if "vocab_size" in word) for config in configs.values()):
        _prepared(folder, f"{GPU} {text}")  # once, before several ask for it at once
    print(f"\npeak GiB, from a formula                {'foreseen':>10}{'true':>10}{'off by':>9}   bar {MEMORY_BAR:.0%}")
    with ThreadPoolExecutor(at_once) as pool:
        found = zip(configs, pool.map(measured, configs.items()), strict=True)
        return [name for name, run in found if not _line(name, run, "peak_gib", MEMORY_BAR)]


def _time(folder: Path, configs: dict[str, str], seconds: float, *, is_gpu: bool) -> list[str]:
    """Seconds of a run of each config, foreseen by a probe and true; names of those that are too far off."""
    found, bar = {}, GPU_TIME_BAR if is_gpu else CPU_TIME_BAR
    for name, text in configs.items():
        words = _words(folder, f"{GPU if is_gpu else ''} {text} schedule.warmup_updates=5")
        config, data = _prepared(folder, f"{GPU if is_gpu else ''} {text} schedule.warmup_updates=5")
        print(f"{name}:", flush=True)
        known = probe(config, data, lambda said: print(f"  {said}", flush=True))
        # As many updates as bring the whole near the seconds that were asked for, with all that happens beside them.
        updates = max(LEAST_UPDATES, int((seconds - known.start) / known.update))
        tokens = config.data.tokens_per_update
        for _ in range(4):
            foreseen = foresee(compose_with(words, updates * tokens), data).seconds or seconds
            updates = max(LEAST_UPDATES, int(updates * (seconds - known.start) / max(foreseen - known.start, 1e-9)))
        found[name] = run = _trained(folder, name, [*words, f"training_tokens={updates * tokens}"])
        print(f"  {known}\n  {updates} updates; true: an update {run.get('update')}, written in {run.get('written')}", flush=True)
    print(f"\nseconds, from a probe                   {'foreseen':>10}{'true':>10}{'off by':>9}   bar {bar:.0%}")
    return [name for name, run in found.items() if not _line(name, run, "seconds", bar)]


def compose_with(words: list[str], training_tokens: int) -> RunConfig:
    """The resolved run of some words with a budget."""
    return resolve(compose([*words, f"training_tokens={training_tokens}"]))


def _line(name: str, run: dict[str, Any], what: str, bar: float) -> bool:
    """Print a line of a table; whether its bar is kept."""
    if "error" in run:
        print(f"{name:40}failed: {run['error']}", flush=True)
        return False
    foreseen, true = run["foreseen"][what], run[what]
    off = foreseen / true - 1
    print(f"{name:40}{foreseen:10.2f}{true:10.2f}{off:+9.1%}   {'' if abs(off) <= bar else 'MISSED'}", flush=True)
    return abs(off) <= bar


def _prepared(folder: Path, text: str) -> tuple[RunConfig, PreparedData]:
    """A run and its data."""
    run = resolve(compose([*_words(folder, text), "training_tokens=10000000"]))
    return run, prepare(run.data, run.tokenizer, lambda said: None)


def _words(folder: Path, text: str) -> list[str]:
    """Overrides, those typed last in force."""
    chosen = {word.partition("=")[0]: word for word in ["data=text", f"data.path={folder / 'text.jsonl'}", *text.split()]}
    return list(chosen.values())


def _trained(folder: Path, name: str, words: list[str]) -> dict[str, Any]:
    """Train a run by the command, and read what it foresaw and what became true."""
    study = "".join(letter if letter.isalnum() else "_" for letter in name)
    command = [sys.executable, "-m", "llama_lab", "train", *words, f"name={study}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8", errors="replace")
    paths = list((folder / "outputs" / study).glob("*/summary.json"))
    if done.returncode or len(paths) != 1:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    summary = json.loads(paths[0].read_text(encoding="utf-8"))
    foreseen = json.loads((paths[0].parent / "meta.json").read_text(encoding="utf-8"))["predicted"]
    rows = read_rows(paths[0].parent / "metrics.jsonl")
    speeds = [row["speed/tokens_per_second"] for row in rows if "speed/tokens_per_second" in row]
    return {
        "foreseen": foreseen,
        "seconds": summary["wall_seconds"],
        "peak_gib": max(row.get("memory/peak_gib", 0.0) for row in rows),
        "update": f"{rows[0]['tokens'] / rows[0]['update'] / statistics.median(speeds):.4g} s",
        "written": f"{summary.get('save_seconds', 0.0):.3g} s",
    }


def _write_text(path: Path) -> None:
    """Documents of many different words, so that a large vocabulary can be learned from them."""
    draw = random.Random(0)
    words = ["".join(draw.choices(LETTERS, k=draw.randint(2, 11))) for _ in range(WORDS)]
    weights = [1 / (rank + 5) for rank in range(WORDS)]
    texts = (" ".join(draw.choices(words, weights, k=draw.randint(50, 500))) for _ in range(DOCUMENTS))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
