"""A search by Optuna: its TPE sampler proposes points, a sqlite file remembers them.

The sweep's folder is the truth of what was run, and the study follows it: a start tells the study what it does not know yet, so
that a kill between the two costs nothing. What a point counts with is said in ranking.py.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_lab.config.errors import ConfigError
from llama_lab.config.literal import literal
from llama_lab.config.overrides import PRESET
from llama_lab.config.schema import GROUPS, Origin, RunConfig
from llama_lab.config.validate import validate
from llama_lab.lab.sweep.frozen import add_jobs, save_trials
from llama_lab.lab.sweep.jobs import Job, Sweep, place
from llama_lab.lab.sweep.ranking import point_result
from llama_lab.lab.sweep.space import Axis, Point, repeated

# A space of few points is over when so many proposals in a row were known or impossible.
PATIENCE = 50


class Proposer:
    """The study of a sweep.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, sweep: Sweep):
        self._sweep, self._optuna = sweep, _optuna()
        self._axes = [axis for axis in sweep.axes if not axis.is_seed]
        self._distributions = {axis.key: self._distribution(axis) for axis in self._axes}
        startup = len({job.point for job in sweep.jobs})
        sampler = self._optuna.samplers.TPESampler(seed=sweep.settings.seed + startup, n_startup_trials=startup)
        storage = f"sqlite:///{(sweep.folder / 'search.db').as_posix()}"
        self._study = self._optuna.create_study(
            study_name=sweep.folder.name,
            storage=storage,
            sampler=sampler,
            direction=sweep.settings.direction.value,
            load_if_exists=True,
        )
        self._exhausted = False
        self._adopt()

    @property
    def is_over(self) -> bool:
        """Whether no point will come any more."""
        return self._exhausted or self._sweep.to_come == 0

    def ask(self) -> list[Job]:
        """The jobs of a new point, frozen; none if there is none left."""
        for _ in range(PATIENCE):
            trial = self._study.ask(self._distributions)
            values = {
                axis.key: trial.params[axis.key] if axis.choices else axis.typed(trial.params[axis.key]) for axis in self._axes
            }
            if jobs := self._jobs(values, trial.number):
                add_jobs(self._sweep, jobs)
                return jobs
            self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
        self._exhausted = True
        return []

    def tell(self) -> None:
        """Let the study know every point whose jobs have all come to an end. What failed stays open: another start tries it
        again.
        """
        state = self._optuna.trial.TrialState
        points = self._points()
        for trial in self._study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            jobs = points.get(trial.number, [])
            if not jobs or not all(job.outcome.decided for job in jobs):
                continue
            result = point_result(jobs, self._sweep.settings)
            if result.mean is not None:
                self._study.tell(trial.number, result.mean)
            elif result.last is None:
                self._study.tell(trial.number, state=state.FAIL)
            else:
                # What was stopped early has the value that it had reached, as a trial that Optuna itself had pruned.
                update, value = result.last
                live = self._optuna.trial.Trial(self._study, trial._trial_id)
                live.report(value, update)
                self._study.tell(trial.number, state=state.PRUNED)

    def _points(self) -> dict[int, list[Job]]:
        found: defaultdict[int, list[Job]] = defaultdict(list)
        for job in self._sweep.jobs:
            if job.trial is not None:
                found[job.trial].append(job)
        return found

    def _adopt(self) -> None:
        """Bring study and folder together: points that the study has not heard of, and proposals that a kill kept from becoming
        jobs.
        """
        state = self._optuna.trial.TrialState
        known = self._points()
        for trial in self._study.get_trials(deepcopy=False, states=(state.RUNNING, state.WAITING)):
            if trial.number not in known and trial.state is state.RUNNING:
                self._study.tell(trial.number, state=state.FAIL)
        new: defaultdict[str, list[Job]] = defaultdict(list)
        for job in self._sweep.jobs:
            if job.trial is None:
                new[job.point].append(job)
        for jobs in new.values():
            self._study.enqueue_trial({axis.key: self._parameter(axis, jobs[0].values[axis.key]) for axis in self._axes})
            number = self._study.ask(self._distributions).number
            for job in jobs:
                job.trial = number
        if new:
            save_trials(self._sweep)

    def _jobs(self, values: Point, trial: int) -> list[Job]:
        """The jobs of a point that are not there yet; none where it is known, or makes no sound run."""
        known = {job.folder for job in self._sweep.jobs}
        jobs = []
        for point in repeated([values], self._sweep.axes):
            try:
                run = changed(base_of(self._sweep.bases, point), point)
            except ConfigError:
                return []
            slug, folder = place(run, point)
            words = self._sweep.fixed + [f"{key}={value}" for key, value in point.items()]
            jobs.append(Job(words, point, run, slug, folder, trial=trial))
        return [] if any(job.folder in known for job in jobs) else jobs

    def _distribution(self, axis: Axis) -> Any:
        distributions = self._optuna.distributions
        if axis.choices:
            return distributions.CategoricalDistribution(axis.choices)
        if axis.is_whole:
            return distributions.IntDistribution(math.ceil(axis.low), math.floor(axis.high), log=axis.is_log)
        return distributions.FloatDistribution(axis.low, axis.high, log=axis.is_log)

    def _parameter(self, axis: Axis, text: str) -> Any:
        return text if axis.choices else int(text) if axis.is_whole else float(text)


def base_of(bases: Sequence[Job], point: Point) -> RunConfig:
    """The frozen run with a point's options and seeds; with its options alone in a sweep that was frozen without the others."""
    options = [base for base in bases if all(base.values[key] == point[key] for key in base.values if "." not in key)]
    seeds = [base for base in options if all(base.values[key] == point[key] for key in point if key.startswith("seed."))]
    return (seeds or options)[0].run


def changed(run: RunConfig, point: Point) -> RunConfig:
    """A frozen run with the fields of a point set, checked like any other; what is no field is in it already.

    Raises:
        ConfigError: that makes no sound run.
    """
    parser, tree = OverridesParser.create(), OmegaConf.structured(literal(replace(run, origin=Origin())))
    for key, text in point.items():
        value = parser.parse_override(f"{key}={text}").value()
        if "." in key or key not in (*GROUPS, PRESET):
            try:
                OmegaConf.update(tree, key, value)
            except OmegaConfBaseException as error:
                raise ConfigError([(f"{key}={text}", f"cannot be set: {str(error).splitlines()[0]}")]) from None
    found: Any = OmegaConf.to_object(tree)
    found.origin = run.origin
    validate(found)
    return found


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        rule = "needs a package that is not installed: pip install 'llama_lab[sweep]'; sweep.search=random needs none"
        raise ConfigError([("sweep.search=optuna", rule)], scope="this sweep") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
