"""The learning rate's course over a run, as a factor of its peak. Needs no torch."""

import math

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import ConstantConfig, CosineConfig, LinearConfig, ScheduleConfig, WsdConfig


def lr_factor(schedule: ScheduleConfig, max_lr: float, update: int, updates: int) -> float:
    """Share of its peak that every learning rate has in an update.

    Warm-up rises in a straight line from `min_lr`, just before the first update, to `max_lr` in update `warmup_updates`. The last
    update is made at `min_lr`, unless the schedule is constant.

    Args:
        schedule: the course; `min_lr` is on the scale of `max_lr`.
        max_lr: peak of the group that the config speaks of, above 0.
        update: number of the update, 1 to `updates`.
        updates: updates of the whole run.

    Returns:
        In [min_lr / max_lr, 1]; a function of these arguments alone, so a resumed run goes on where it was.

    Raises:
        ValueError: the update is outside the run.
        ConfigError: the schedule is one whose course nobody has written down here.
    """
    if not 1 <= update <= updates:
        raise ValueError(f"update {update} is outside a run of {updates}")
    lowest = schedule.min_lr / max_lr
    if update < schedule.warmup_updates:
        return lowest + (1.0 - lowest) * update / schedule.warmup_updates
    return lowest + (1.0 - lowest) * _height(schedule, update, updates)


def _height(schedule: ScheduleConfig, update: int, updates: int) -> float:
    """Where between its lowest (0) and its peak (1) the rate stands after warm-up."""
    progress = (update - schedule.warmup_updates) / max(updates - schedule.warmup_updates, 1)
    match schedule:
        case CosineConfig():
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case LinearConfig():
            return 1.0 - progress
        case WsdConfig():
            return min(1.0, (updates - update) / schedule.cooldown_updates(updates))
        case ConstantConfig():
            return 1.0
    rule = "is no case of _height in llama_lab/training/schedule.py, so nothing says its course; add one there"
    raise ConfigError([(type(schedule).__name__, rule)])
