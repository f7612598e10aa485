"""After which updates a run is validated, scored on tasks and sampled: functions of the update's number. Torch-free."""

import math

from llama_lab.config.schema import EvalConfig, RunConfig, SampleConfig


def due(update: int, every: int | None) -> bool:
    """Whether something that happens every so many updates happens after this one."""
    return every is not None and update % every == 0


def validation_due(node: EvalConfig | None, update: int, updates: int) -> bool:
    """Whether the model is validated after this update: at its interval and at the end."""
    return node is not None and (update == updates or due(update, node.every_updates))


def scores_due(node: EvalConfig | None, update: int, updates: int) -> bool:
    """Whether the model is scored on tasks after this update: at their interval and at the end."""
    return node is not None and bool(node.tasks) and (update == updates or due(update, node.tasks_every_updates))


def samples_due(node: SampleConfig, run: RunConfig, update: int) -> bool:
    """Whether samples are drawn after this update: at `first_tokens`, then after intervals that grow, and at the end."""

    def marks(tokens: int) -> int:
        """Samples up to `tokens`: the largest n with first (1 + growth + … + growth^(n-1)) at most `tokens`."""
        intervals = tokens / node.first_tokens
        return int(intervals if node.growth == 1 else math.log1p(intervals * (node.growth - 1)) / math.log(node.growth))

    size = run.data.tokens_per_update
    return marks(update * size) > marks((update - 1) * size) or update == run.updates
