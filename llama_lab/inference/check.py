"""Whether the files that a run's samples and scores are made from are there. Torch-free: it is asked before anything starts."""

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Problem, RunConfig
from llama_lab.inference.few_shot import prompt_set_problems
from llama_lab.inference.tasks import load_tasks


def check_observed(run: RunConfig) -> None:
    """Raise ConfigError for every prompt set and task of a run that cannot be read."""
    sets = prompt_set_problems(run.sample.prompt_sets) if run.sample is not None else []
    found: list[Problem] = [(f"sample.prompt_sets: {name}", rule) for name, rule in sets]
    if run.eval is not None:
        try:
            load_tasks(run.eval.tasks)
        except ConfigError as error:
            found += error.problems
    if found:
        raise ConfigError(found)
