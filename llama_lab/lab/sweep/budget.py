"""What a sweep may take in all: refused before its first job where more is foreseen."""

import shlex

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Launcher
from llama_lab.data.prepare import prepare
from llama_lab.lab.sweep.frozen import known_outcome, take_over
from llama_lab.lab.sweep.jobs import Job, Sweep
from llama_lab.lab.sweep.local import packing
from llama_lab.training.foresight.forecast import foresee, keep_to_budget
from llama_lab.training.foresight.memory import expected_micro_batch
from llama_lab.training.run_folder import RunFolder


def keep_sweep_to_budget(sweep: Sweep) -> None:
    """Refuse a sweep that is foreseen to take more hours than its budget until every job is at its end; or of which nobody knows.

    Raises:
        ConfigError: it would, or nobody does.
    """
    if sweep.budget.gpu_hours is None:
        return
    if sweep.settings.launcher is Launcher.slurm:
        rule = "cannot be kept to: how fast Slurm's nodes train cannot be found out here; sweep.slurm.minutes bounds each job"
        raise ConfigError([(f"budget.gpu_hours={sweep.budget.gpu_hours:g}", rule)], scope="this sweep")
    take_over(sweep)
    _, threads = packing(sweep)
    forecasts = []
    for job in sweep.jobs:
        data = prepare(job.run.data, job.run.tokenizer, print)
        forecasts.append(foresee(expected_micro_batch(job.run, data), data, threads=threads))
    words = sweep.command[2:] if sweep.command[1:2] == ["train"] else ["…"]
    command = shlex.join(["llama-lab", "plan", "--probe", *words]).replace("'…'", "…")
    left = [left_of(sweep, job) for job in sweep.jobs]
    scope = f"this sweep of {len(forecasts)} jobs"
    keep_to_budget(sweep.budget, forecasts, scope, command, left=left, to_come=sweep.to_come)


def left_of(sweep: Sweep, job: Job) -> float:
    """The share of a job's updates that another start of the sweep would train."""
    return 0.0 if known_outcome(sweep, job).decided else RunFolder(job.folder).left(job.run)
