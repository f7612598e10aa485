"""The pictures of a run: what they draw where rows are few, and that nothing of them is cut off."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from llama_lab.config.compose import compose
from llama_lab.config.identity import save_config
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import RunConfig
from llama_lab.training.plots import draw_plots, rates, wrapped

LONG = "smoke-" + "-".join(f"a_rather_long_key_{number}-0.{number}" for number in range(6)) + "-0123abcd"


@pytest.fixture
def run() -> RunConfig:
    """80 updates, the last 48 of them a cool-down."""
    words = ["experiment=smoke", "schedule=wsd", "schedule.warmup_updates=5", "schedule.cooldown_fraction=0.6"]
    return resolve(compose([*words, "training_tokens=163840", "optim.max_lr=0.01", "precision=fp32"]))


def test_the_schedule_is_drawn_where_it_bends_and_not_where_rows_are(run: RunConfig):
    done, to_come = rates(run, 0, 60)
    assert [point["tokens"] // 2048 for point in done] == list(range(1, 61))
    assert [point["tokens"] // 2048 for point in to_come] == list(range(60, 81))
    level = [point["train/lr"] for point in done]
    assert level[4:32] == [0.01] * 28
    assert level[3] < 0.01 and level[32] < 0.01
    assert to_come[-1]["train/lr"] == run.schedule.min_lr


def test_a_fork_has_its_own_schedule_from_where_it_began(run: RunConfig):
    done, to_come = rates(run, 70, 80)
    assert [point["tokens"] // 2048 for point in done] == list(range(71, 81))
    assert len(to_come) == 1
    assert rates(run, 70, 70)[0] == []


def test_a_long_run_is_drawn_at_as_many_points_as_can_be_seen(run: RunConfig):
    long = replace(run, training_tokens=2048 * 1_000_000)
    done, _ = rates(long, 0, 1_000_000)
    assert (len(done), done[0]["tokens"], done[-1]["tokens"]) == (2000, 2048, long.training_tokens)


def test_pictures_of_a_run_with_a_long_name_are_whole(run: RunConfig, tmp_path: Path):
    folder = tmp_path / LONG
    folder.mkdir()
    save_config(run, folder / "config.yaml")
    rows = [
        {"update": update, "tokens": 2048 * update, "train/loss": 3.0, "train/lr": 0.01, "speed/tokens_per_second": 1000.0 * update}
        for update in (1, 10, 20)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    drawn = draw_plots(folder, vocab_size=257)
    assert [path.name for path in drawn] == ["loss.png", "learning_rate.png", "throughput.png"]
    for path in drawn:
        picture = imread(path)
        # A title that is too long reaches both edges.
        assert picture[:, :3].min() == picture[: len(picture) // 8, -3:].min() == 1


def test_titles_are_broken_and_never_formulas():
    assert all(len(line) <= 40 for line in wrapped(LONG, 40).splitlines())
    assert wrapped(LONG, 40).replace("\n", "") == LONG
    assert wrapped("a$b$c", 40) == r"a\$b\$c"
