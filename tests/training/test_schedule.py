"""The course of the learning rate: its ends, its shape, its bounds."""

import re

import pytest

from llama_lab import ConfigError, compose, train
from llama_lab.config.schema import ConstantConfig, CosineConfig, LinearConfig, ScheduleConfig, WsdConfig
from llama_lab.training.schedule import lr_factor

MAX_LR = 0.01


def course(schedule: ScheduleConfig, updates: int) -> list[float]:
    return [lr_factor(schedule, MAX_LR, update, updates) for update in range(1, updates + 1)]


@pytest.mark.parametrize("kind", [CosineConfig, LinearConfig, ConstantConfig, WsdConfig])
def test_warm_up_is_a_straight_line_from_min_lr_to_the_peak(kind):
    cooldown = {"cooldown_fraction": 0.25} if kind is WsdConfig else {}
    factors = course(kind(warmup_updates=4, min_lr=0.002, **cooldown), 20)
    assert factors[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert max(factors) <= 1.0 and min(factors[3:]) >= 0.2


@pytest.mark.parametrize("warmup_updates", [0, 4])
@pytest.mark.parametrize("kind", [CosineConfig, LinearConfig, WsdConfig])
def test_the_last_update_is_made_at_min_lr(kind, warmup_updates):
    cooldown = {"cooldown_fraction": 0.5} if kind is WsdConfig else {}
    factors = course(kind(warmup_updates=warmup_updates, min_lr=0.001, **cooldown), 20)
    assert factors[-1] == pytest.approx(0.1)
    after_peak = factors[warmup_updates:]
    assert after_peak == sorted(after_peak, reverse=True)


def test_shapes_between_peak_and_end():
    assert course(LinearConfig(warmup_updates=2, min_lr=0.0), 6) == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert course(CosineConfig(warmup_updates=2, min_lr=0.0), 6)[1:] == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)
    assert course(WsdConfig(warmup_updates=2, min_lr=0.0, cooldown_fraction=0.4), 10) == pytest.approx(
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    )
    assert course(ConstantConfig(warmup_updates=0, min_lr=0.0), 3) == [1.0, 1.0, 1.0]


def test_a_run_of_one_update_trains():
    assert lr_factor(ConstantConfig(warmup_updates=0, min_lr=0.0), MAX_LR, 1, 1) == 1.0
    assert lr_factor(LinearConfig(warmup_updates=0, min_lr=0.001), MAX_LR, 1, 1) == pytest.approx(0.1)


def test_a_schedule_without_a_course_is_refused_before_a_run_begins(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_LAB_OUTPUTS", str(tmp_path))
    monkeypatch.setattr("llama_lab.training.schedule.LinearConfig", CosineConfig)
    said = "LinearConfig is no case of _height in llama_lab/training/schedule.py, so nothing says its course; add one there"
    with pytest.raises(ConfigError, match=re.escape(said)):
        train(compose(["experiment=smoke", "schedule.warmup_updates=19"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("update", [0, 11])
def test_updates_outside_the_run_are_refused(update):
    with pytest.raises(ValueError, match=f"update {update} is outside a run of 10"):
        lr_factor(ConstantConfig(warmup_updates=0, min_lr=0.0), MAX_LR, update, 10)
