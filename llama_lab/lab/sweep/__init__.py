"""A sweep: one command that stands for many runs, checked as a whole, run side by side, ended by a table.

    overrides -> axes -> points -> jobs (composed, validated, named) -> frozen in the sweep's folder -> processes -> summary.csv

    expand.py   what was typed -> jobs (jobs.py)  run.py      starts jobs, watches them, decides what comes next
    space.py    axes and points                   place.py    what that asks of local.py (GPUs, cores) and slurm.py (a cluster)
    frozen.py   the sweep's folder                job_process.py  one run in a process of its own
    search.py   Optuna                            halving.py  which job need not end
    command.py  llama-lab sweep                   ranking.py  what jobs and points are ranked by, and which of them count
    data.py     what the jobs are trained on      show.py     lines, the live table, summary.csv

Hydra's launchers are not used: the basic one runs jobs in one process, checks a job when its turn comes, shows errors at the end
and numbers folders anew at every start. Here a run's folder follows from its config, so a sweep that is typed again skips what is
finished and goes on with what is not.
"""

from llama_lab.lab.sweep.expand import describe, expand
from llama_lab.lab.sweep.frozen import load_sweep
from llama_lab.lab.sweep.jobs import Job, Sweep

__all__ = ["Job", "Sweep", "describe", "expand", "load_sweep", "run_sweep"]


def run_sweep(sweep: Sweep) -> int:
    """Run the jobs and print what came of them.

    Returns:
        The exit code: 1 if a job failed, 75 if the sweep was stopped, else 0.

    Raises:
        ConfigError: the sweep is running already, or this machine lacks what it needs.
    """
    from llama_lab.lab.sweep.run import run

    return run(sweep)
