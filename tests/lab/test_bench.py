"""`llama-lab bench` on models that are too small to be worth measuring."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.paths import config_folder
from llama_lab.config.schema import CosineConfig
from llama_lab.lab.bench.command import run_bench_command
from llama_lab.lab.bench.measure import forced_words, told_apart

SMALL = ["precision=fp32", "tokenizer=bytes", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "hardware=cpu"]
BATCH = ["data.max_seq_len=32", "data.tokens_per_update=256", "data=text"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {number} of a text that repeats itself"}) + "\n" for number in range(200)))
    return path


def test_configs_are_measured_one_after_another(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, *BATCH, f"data.path={text}", "--updates", "25", "--out", str(tmp_path / "bench"), "-m", "optim=muon,adamw"]
    assert run_bench_command(words) == 0
    muon, adamw = (json.loads(line) for line in (tmp_path / "bench" / "bench.jsonl").read_text().splitlines())
    assert (muon["config"].split()[-1], adamw["config"].split()[-1]) == ("optim=muon", "optim=adamw")
    for found in (muon, adamw):
        assert found["tokens_per_second"] > 0
        assert sum(share for part, share in found["parts"].items() if part != "data") == pytest.approx(1, abs=0.01)
        assert (found["updates"], found["tokens_per_update"], found["mfu"], found["error"]) == (25, 256, None, "")
        assert 0 < found["loss"] < 6
    assert (tmp_path / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    # What all have in common is said once, above.
    assert said.count("data.max_seq_len=32") == said.count("tokenizer=bytes") == 1
    headings, *rows = [line.split() for line in said.partition("Training speed")[2].splitlines()[1:4]]
    assert headings[:2] == ["config", "tok/s"] and "forward" in headings
    assert [row[0] for row in rows] == ["optim=muon", "optim=adamw"]
    # The legend of the parts was cut where the picture ends.
    assert imread(tmp_path / "bench" / "bench.png")[:, -2:].min() == 1
    assert not list(tmp_path.glob("outputs/*"))


def test_configs_are_told_apart_by_the_words_that_only_they_have() -> None:
    found = told_apart(["data=text 'data.path=my book.txt' model.dim=64", "data=text 'data.path=my book.txt' model.dim=128"])
    assert found == ("data=text 'data.path=my book.txt'", ["model.dim=64", "model.dim=128"])
    assert told_apart(["data=text model.dim=64"]) == ("data=text model.dim=64", [""])
    assert told_apart(["optim=muon", "optim=adamw"]) == ("", ["optim=muon", "optim=adamw"])
    assert told_apart(["(the default)"]) == ("(the default)", [""])


def test_presets_are_measured_with_the_schedule_that_they_set(text: Path, tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    # A value that `schedule=constant` does not have.
    preset = "# @package _global_\n# Mine?\ndefaults:\n  - override /schedule: cosine\nschedule:\n  min_lr: 1.0e-5\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(preset, encoding="utf-8")
    words = ["experiment=mine", *SMALL, *BATCH, f"data.path={text}"]
    run = compose([*words, *forced_words(words)], config_dir=tmp_path / "own")
    assert (run.schedule.warmup_updates, run.eval) == (10, None)
    assert isinstance(run.schedule, CosineConfig)
    for option in ("lr_sweep", "seed_small", "schedule_shapes"):
        with pytest.raises(ConfigError) as caught:
            run_bench_command([f"experiment={option}", *SMALL, *BATCH, "data.path=nowhere.txt", "model.dimm=1"])
        assert [subject for subject, _ in caught.value.problems] == ["model.dimm=1"]


def test_options_of_ones_own_are_measured(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found in a folder named from here; what is measured lies where runs do, also where that begins with ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_LAB_OUTPUTS", "~/found")
    (tmp_path / "own" / "optim").mkdir(parents=True)
    option = (config_folder("conf") / "optim" / "adamw.yaml").read_text(encoding="utf-8")
    (tmp_path / "own" / "optim" / "mine.yaml").write_text(option, encoding="utf-8")
    words = [*SMALL, *BATCH, f"data.path={text}", "--updates", "20", "-m", "optim=mine,adamw", "--config-dir", "own"]
    assert run_bench_command(words) == 0
    mine, ours = (json.loads(line) for line in (tmp_path / "found" / "bench" / "bench.jsonl").read_text().splitlines())
    assert (mine["config"].split()[-1], mine["error"]) == ("optim=mine", "")
    assert mine["loss"] == pytest.approx(ours["loss"], rel=1e-3)
    with pytest.raises(ConfigError, match=r"--config-dir nowhere is no folder"):
        run_bench_command(["--config-dir", "nowhere"])


def test_what_fails_is_said_and_mistakes_cost_no_time(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"--updates 3 is too few to say anything: the first 10 are not counted, so 20 is the least; try 40"
    ):
        run_bench_command(["--updates", "3"])
    with pytest.raises(ConfigError, match=r"--update=30 is no flag of bench"):
        run_bench_command(["--update=30"])
    with pytest.raises(ConfigError, match=r"model\.dim"):
        run_bench_command(["model.dimm=3"])
    assert run_bench_command([*SMALL, *BATCH, f"data.path={text.with_name('nothing.jsonl')}", "--out", str(text.parent)]) == 1
    assert "failed" in capsys.readouterr().out
