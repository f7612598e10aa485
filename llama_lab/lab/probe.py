"""Some updates of a run, trained to find out what the whole run will take: `llama-lab plan --probe`.

They are a run like any other, in a process and a folder of its own: the same model, data, device and settings, by the command that
trains anything. Its length alone differs, and that a checkpoint comes soon, and validation and samples twice, so that the second
time says what every further one takes. Rows of its log tell the times apart.
"""

import itertools
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import save_config
from llama_lab.config.schema import BudgetConfig, Compile, RunConfig, TrackerMode
from llama_lab.data.prepare import PreparedData
from llama_lab.lab.sweep.job_process import Request, be_job, read_answer
from llama_lab.lab.sweep.jobs import Outcome
from llama_lab.training.foresight.forecast import Probe, keep_probe, validated_tokens
from llama_lab.training.foresight.occasions import occasions
from llama_lab.training.metrics import read_rows, short_time
from llama_lab.training.processes.stop import blocked_signals

UPDATES = 10
ENOUGH_SECONDS = 10.0
"""What the updates of a probe should take together: quicker ones are made again, more of them."""
MOST_UPDATES = 2000
VALIDATED_UPDATES = 16
"""A validation in a probe predicts at most the tokens of so many updates; a longer one takes as many times as long."""


@dataclass(frozen=True, slots=True)
class Timetable:
    """When what happens in a probe of so many updates.

    Attributes:
        row: updates between two rows of the log. The host waits for the device there, so it is not each one.
        look: the update that validation and samples first follow; they do again at the end.
        save: the update that is saved, in a row's time of its own. What is written meanwhile should be done when the last look
            comes, which would take longer beside it.
    """

    updates: int
    row: int
    look: int
    save: int

    @classmethod
    def of(cls, updates: int) -> "Timetable":
        """For an even number of updates, at least `UPDATES`."""
        row, look = max(3, updates // 8), updates // 2
        return cls(updates, row, look, (look // row + 1) * row + 1)


def probe(run: RunConfig, data: PreparedData, say: Callable[[str], None], *, threads: int | None = None) -> Probe:
    """Train some updates of a run, say what each part takes, and keep that for the next time.

    Args:
        run: resolved, with a micro-batch.
        threads: of the CPU that each process will have; null: as many as one would have that started now.

    Raises:
        ConfigError: the updates could not be trained.
    """
    say(f"Probing {UPDATES} updates, in a process of its own …")
    found = _measured(run, data, UPDATES, threads)
    quick = found.update * UPDATES < ENOUGH_SECONDS
    if quick or run.hardware.compile is Compile.always:
        # What was compiled is found on the disk the next time, by a further probe as by the run.
        updates = min(MOST_UPDATES, round(ENOUGH_SECONDS / found.update / 2) * 2) if quick else UPDATES
        say(f"Probing {max(updates, UPDATES)} updates, {'for these were quick' if quick else 'now that all is compiled'} …")
        found = _measured(run, data, max(updates, UPDATES), threads)
    keep_probe(run, data, found, threads=threads)
    say(f"An update takes {found.update:.3g} s, a validation {short_time(found.validation)}, samples {short_time(found.sample)}")
    return found


def measured(probed: RunConfig, table: Timetable, folder: Path, summary: dict[str, Any], *, validation_scale: float = 1.0) -> Probe:
    """What the files of a probe say.

    Args:
        probed: its config.
        folder: of the run that it was.
        summary: what it has summed up at its end.
        validation_scale: how many times as long as its validations those of the run are.
    """
    rows, samples = read_rows(folder / "metrics.jsonl"), read_rows(folder / "samples.jsonl")
    logged = [row for row in rows if "train/loss" in row]
    laps = {now["update"]: (before, now) for before, now in itertools.pairwise(logged)}
    tokens = probed.data.tokens_per_update

    def training(before: dict[str, Any], now: dict[str, Any]) -> float:
        """Seconds of a lap that went into its updates."""
        return (now["tokens"] - before["tokens"]) / now["speed/tokens_per_second"]

    # The first lap holds what is new, the last is short.
    steady = [lap for update, lap in laps.items() if update % table.row == 0 and update > table.row]
    update = sum(training(*lap) for lap in steady) * tokens / sum(now["tokens"] - before["tokens"] for before, now in steady)
    saved = laps.get((table.save // table.row + 1) * table.row)
    times = {"save": 0.0, "write": summary.get("save_seconds", 0.0), "validation": 0.0, "score": 0.0, "sample": 0.0}
    if probed.checkpoint.every_tokens is not None and saved is not None:
        before, now = saved
        times["save"] = max(0.0, now["seconds"] - before["seconds"] - training(before, now))
    at = logged[-1]["seconds"]
    last = [row for row in [*rows, *samples] if row["update"] == table.updates]
    for name, mark in (("validation", "val/loss"), ("score", "task/"), ("sample", "text")):
        if ends := [row["seconds"] for row in last if any(key.startswith(mark) for key in row)]:
            times[name], at = max(0.0, max(ends) - at), max(ends)
    found = Probe(start=0.0, update=update, peak_gib=logged[-1]["memory/peak_gib"], updates=table.updates, **times)
    start = max(0.0, summary["wall_seconds"] - replace(found, write=0.0).seconds(occasions(probed, 0)))
    return replace(found, start=start, validation=found.validation * validation_scale)


def shortened(run: RunConfig, data: PreparedData, table: Timetable) -> tuple[RunConfig, float]:
    """The run that a probe trains, and how many times as long the validations of the run itself are."""
    tokens, node, scale = run.data.tokens_per_update, run.eval, 1.0
    if node is not None:
        node = replace(node, every_updates=table.look, tasks_every_updates=table.look)
        if (whole := validated_tokens(run, data)) > VALIDATED_UPDATES * tokens:
            node.max_tokens = max(run.data.max_seq_len, VALIDATED_UPDATES * tokens // len(data.sources))
            scale = whole / validated_tokens(replace(run, eval=node), data)
    probed = replace(
        run,
        name="probe",
        training_tokens=table.updates * tokens,
        fresh=False,
        profile=False,
        log=replace(run.log, every_updates=table.row),
        eval=node,
        sample=None if run.sample is None else replace(run.sample, first_tokens=table.look * tokens, growth=1.0),
        checkpoint=replace(run.checkpoint, every_tokens=table.save * tokens, keep_every_tokens=None, at_end=False),
        budget=BudgetConfig(),
        wandb=None if run.wandb is None else replace(run.wandb, mode=TrackerMode.offline),
    )
    return probed, scale


def _measured(run: RunConfig, data: PreparedData, updates: int, threads: int | None) -> Probe:
    """Train so many updates and take their times."""
    table = Timetable.of(updates)
    probed, scale = shortened(run, data, table)
    with tempfile.TemporaryDirectory(prefix="llama_lab-probe-") as name:
        outcome = _trained(probed, Path(name), threads)
        if outcome.folder is None or outcome.status != "finished":
            raise ConfigError([("--probe", f"could not train {updates} updates: {outcome.message or outcome.status}")])
        return measured(probed, table, Path(outcome.folder), outcome.summary, validation_scale=scale)


def _trained(run: RunConfig, folder: Path, threads: int | None) -> Outcome:
    """Train a run below `folder` in a process of its own."""
    request = Request(
        config=folder / "config.yaml",
        output=folder / "output.log",
        answer=folder / "answer.json",
        command=["llama-lab", "plan", "--probe"],
        slug=None,
        environment=dict(os.environ)
        | {"LLAMA_LAB_OUTPUTS": str(folder / "outputs")}
        | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
    )
    save_config(run, request.config)
    process = multiprocessing.get_context("spawn").Process(target=be_job, args=(request,), name="probe")
    with blocked_signals():
        process.start()
    try:
        process.join()
    finally:
        if process.is_alive():
            if os.name == "posix":
                with suppress(OSError):
                    os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
    if (outcome := read_answer(request.answer)) is not None:
        return outcome
    said = request.output.read_text(encoding="utf-8", errors="replace").strip().splitlines() if request.output.is_file() else []
    return Outcome("failed", message=said[-1] if said else f"its process ended with exit code {process.exitcode}")
