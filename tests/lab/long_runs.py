"""Folders of runs as long as real ones, whose rows nobody trained: what a report is timed and tested on."""

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_lab.config.identity import save_config
from llama_lab.config.schema import RunConfig
from llama_lab.data.tokenizer import BytesTokenizer

PROMPTS = ("Return the", "If the argument is not")


def rows_of(draw: random.Random, points: int, final: float, tokens_per_update: int) -> Iterable[dict[str, Any]]:
    """Rows as training writes them: noisy training losses, a validation every twentieth, all keys there are."""
    seconds = 0.0
    for update in range(1, points + 1):
        share = update / points
        loss = final * share**-0.12 + draw.gauss(0, 0.04)
        seconds += 0.2 + draw.random() * 0.02
        axes = {"update": update, "tokens": update * tokens_per_update, "seconds": round(seconds, 3)}
        more = {"train/lr": 1e-3 * min(1, 20 * share) * (1.05 - share), "train/grad_norm": math.exp(draw.gauss(-0.5, 0.3))}
        speed = {"speed/tokens_per_second": draw.gauss(40_000, 1_500), "speed/data_wait": 1e-3, "memory/peak_gib": 0.4}
        yield axes | {"train/loss": loss, "train/perplexity": math.exp(loss)} | more | speed | {"train/spike": 0}
        if update % 20 == 0:
            smooth = final * share**-0.12 + 0.1 + draw.gauss(0, 0.005)
            yield axes | {"val/loss": smooth, "val/perplexity": math.exp(smooth), "val/bits_per_byte": smooth / math.log(2)}


def write_long_run(
    base: RunConfig, folder: Path, *, seed: int, lr: float, points: int, final: float, texts: Sequence[str] = ("one", "two")
) -> Path:
    """Write a finished run of `points` updates.

    Args:
        final: its training loss at the end, but for noise.
        texts: what it wrote to each of the prompts, at the end and half-way.
    """
    per_update = base.data.tokens_per_update
    run = replace(
        base,
        seed=replace(base.seed, init=seed, data=seed),
        optim=replace(base.optim, max_lr=lr),
        training_tokens=points * per_update,
    )
    folder.mkdir(parents=True)
    save_config(run, folder / "config.yaml")
    draw = random.Random(f"{seed} {lr}")
    rows = list(rows_of(draw, points, final, per_update))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    samples = [
        {"update": update, "tokens": update * per_update, "seconds": 1.0, "seed": 0, "prompt": prompt, "text": text, "set": None}
        for update in (points // 2, points)
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    batches = [{"update": update, "hash": f"{seed:08x}{update:08x}"} for update in range(1, points + 1)]
    (folder / "batches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in batches), encoding="utf-8")
    summary = {"status": "finished", "error": None} | {key: value for row in rows[-2:] for key, value in row.items()}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    meta = {
        "command": ["llama-lab", "train", f"optim.max_lr={lr}", f"seed.init={seed}"],
        "code": {"sha256": "c0de" * 16, "commit": "abcd" * 10, "diff": ""},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "llama_lab": "0.1.0"},
        "machine": {"processes": 1, "host": "here", "processor": "a processor", "device": "cpu", "threads": "1"},
        "data": {"data": "d" * 64, "tokenizer": "e" * 64},
        "validation": "f" * 64,
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    BytesTokenizer().save(folder / "tokenizer.json")
    return folder
