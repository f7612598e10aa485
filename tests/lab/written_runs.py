"""Folders of runs that nobody trained: what works on finished runs reads files, and these are such files."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llama_lab.config.identity import run_folder, to_yaml
from llama_lab.config.schema import RunConfig, ScheduleConfig, SeedConfig
from llama_lab.data.tokenizer import BytesTokenizer

UPDATES, TOKENS = 20, 512
"""Of the tiny run: updates in all, and tokens in each."""
META = {
    "code": {"sha256": "c0de"},
    "versions": {"torch": "2"},
    "machine": {"processes": 1, "host": "here"},
    "data": {"data": "d", "tokenizer": "t"},
    "validation": "v",
}
Make = Callable[..., Path]
"""`write_run` without its first argument."""


_WRITTEN: dict[str, str] = {}


def _config(run: RunConfig) -> str:
    """A config as YAML; most of it is that of the run before."""
    key = repr(replace(run, seed=SeedConfig(init=0, data=0, sampling=0)))
    if key not in _WRITTEN:
        _WRITTEN[key] = to_yaml(run)
    seeds = f"seed:\n  init: {run.seed.init}\n  data: {run.seed.data}\n"
    return re.sub(r"^seed:\n  init: \d+\n  data: \d+\n", seeds, _WRITTEN[key], flags=re.MULTILINE)


def write_run(
    base: RunConfig,
    seed: int = 0,
    end: float | None = 2.0,
    lr: float = 1e-3,
    *,
    data_seed: int | None = None,
    last: int = UPDATES,
    name: str = "tiny",
    training_tokens: int | None = None,
    schedule: ScheduleConfig | None = None,
    folder: Path | None = None,
    status: str | None = None,
    **meta: object,
) -> Path:
    """Write a run whose validation loss falls like a power of the update.

    Args:
        base: the run it differs from in what follows.
        seed: of weights and data; `data_seed`: of the data, if another.
        end: its loss at update 20; null: no finite number anywhere.
        last: update that its rows end with.
        meta: entries of meta.json.
    """
    run = replace(
        base,
        name=name,
        seed=replace(base.seed, init=seed, data=seed if data_seed is None else data_seed),
        optim=replace(base.optim, max_lr=lr),
        training_tokens=training_tokens or base.training_tokens,
        schedule=schedule or base.schedule,
    )
    folder = folder or run_folder(run)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(_config(run), encoding="utf-8")
    rows = []
    for update in range(4, last + 1, 4):
        loss = None if end is None else end * (UPDATES / update) ** 0.2
        more = {} if loss is None else {"val/bits_per_byte": loss / math.log(2)}
        rows.append({"update": update, "tokens": update * TOKENS, "seconds": update * 0.5, "val/loss": loss, **more})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    batches = [{"update": update, "hash": f"{run.seed.data:08x}{update:08x}"} for update in range(1, last + 1)]
    (folder / "batches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in batches), encoding="utf-8")
    said = status or ("finished" if last == run.updates else "preempted")
    summary = {"status": said, **(rows[-1] if rows else {}), "update": last}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps(META | meta), encoding="utf-8")
    BytesTokenizer().save(folder / "tokenizer.json")
    return folder
