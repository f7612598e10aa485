"""What the jobs of a sweep are trained on: that it is there before the first starts, and is what finished ones were trained on."""

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Launcher, Problem
from llama_lab.data.prepare import check_sources
from llama_lab.lab.sweep.expand import refused, whose
from llama_lab.lab.sweep.jobs import Sweep
from llama_lab.training.run_data import refuse_other_data, trained_on
from llama_lab.training.run_folder import RunFolder


def refuse_missing_data(sweep: Sweep) -> None:
    """Refuse a sweep of which a job has no text or tokens to train on, as far as that is seen without reading them.

    A cluster's nodes may have what is not here, so on Slurm a job finds out by itself.

    Raises:
        ConfigError: every such problem, with the jobs that have it.
    """
    if sweep.settings.launcher is Launcher.slurm:
        return
    known: dict[str, list[Problem]] = {}
    numbers: dict[Problem, list[int]] = {}
    jobs = [*sweep.jobs, *sweep.bases]
    for job in jobs:
        if RunFolder(job.folder).finished and not job.run.fresh:
            continue
        data = repr((job.run.data, job.run.tokenizer))
        if data not in known:
            try:
                check_sources(job.run.data, job.run.tokenizer)
                known[data] = []
            except ConfigError as error:
                known[data] = error.problems
        for problem in known[data]:
            numbers.setdefault(problem, []).append(job.number)
    if numbers:
        # What a search starts from is no job, and has no number.
        asked = {problem: [number for number in own if number] for problem, own in numbers.items()}
        found = [(subject, rule + whose(asked[subject, rule], len(sweep.jobs))) for subject, rule in numbers]
        raise refused(found, len(sweep.jobs))


def refuse_changed_data(sweep: Sweep) -> None:
    """Refuse finished runs as results of a sweep whose data has changed since; each set of data is looked at once.

    Raises:
        ConfigError: it has.
    """
    seen = set()
    for job in sweep.jobs:
        folder = RunFolder(job.folder)
        data = (repr(job.run.data), repr(job.run.tokenizer), trained_on(folder))
        if folder.finished and not job.run.fresh and data not in seen:
            seen.add(data)
            refuse_other_data(job.run, folder, print)
