"""Rows, the printed line, and what is left of them after a kill."""

import json
import math
from types import SimpleNamespace

import pytest

from llama_lab.training import metrics as metrics_module
from llama_lab.training.console import Console
from llama_lab.training.metrics import Metrics, cut_back, perplexity, read_rows, short_count, short_time
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.tracking.tracker import Tracker

AXES = {"update": 256, "tokens": 8_388_608, "seconds": 53.0}


@pytest.fixture
def metrics(tmp_path):
    with Console(tmp_path / "train.log", total=10) as console:
        yield Metrics(RunFolder(tmp_path), console, Tracker(), vocab_size=257, total_tokens=50_000_000_000, start_tokens=4_194_304)


def test_the_line_has_the_documented_form(metrics, capsys):
    metrics.train(
        AXES, loss=8.0160, lr=0.00008, grad_norm=1.0915, tokens_per_second=157_961.2, data_wait=0.001, peak_gib=1.0, more={}
    )
    line = capsys.readouterr().out.strip()
    assert line.startswith(
        "Step: 256 | Training Progress: 0.02% | Training Loss: 8.0160 | Perplexity: 3029.04 | "
        "Learning Rate: 0.00008 | Norm: 1.0915 | Tokens Processed: 4194K (8M) | tok/s: 157961 | Time: "
    )
    assert line.endswith("s")


def test_the_line_ends_with_the_time_since_the_line_before(metrics, capsys, monkeypatch):
    for now, said in ((1000.0, None), (1012.0, "12s"), (1262.0, "4m 10s")):
        monkeypatch.setattr(metrics_module, "time", SimpleNamespace(perf_counter=lambda now=now: now))
        metrics.train(AXES, loss=8.0, lr=1.0, grad_norm=1.0, tokens_per_second=1.0, data_wait=0.0, peak_gib=1.0, more={})
        assert said is None or capsys.readouterr().out.strip().endswith(f"| Time: {said}")
        capsys.readouterr()


def test_rows_have_the_axes_and_the_summary_the_last_and_best(metrics, tmp_path):
    metrics.validation(AXES, loss=2.0, bits_per_byte=1.5, sources={})
    metrics.validation(AXES | {"update": 512}, loss=3.0, bits_per_byte=math.inf, sources={})
    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert first == AXES | {"val/loss": 2.0, "val/perplexity": math.exp(2.0), "val/bits_per_byte": 1.5}
    assert "val/bits_per_byte" not in second
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["val/loss"], summary["best/val/loss"], summary["update"]) == (3.0, 2.0, 512)


def test_sources_of_a_mixture_have_rows_of_their_own(metrics, tmp_path, capsys):
    own = {"data/web/tokens": 700.0, "data/web/epochs": 0.5}
    metrics.train(AXES, loss=8.0, lr=1.0, grad_norm=1.0, tokens_per_second=1.0, data_wait=0.25, peak_gib=1.0, more=own)
    metrics.validation(AXES, loss=2.0, bits_per_byte=1.5, sources={"web": (1.5, 1.0), "code": (2.5, math.inf)})
    training, validation = read_rows(tmp_path / "metrics.jsonl")
    assert training.items() >= {**own, "speed/data_wait": 0.25}.items()
    assert {key for key in validation if key.startswith("val/")} == {
        *("val/loss", "val/perplexity", "val/bits_per_byte", "val/web/loss", "val/web/bits_per_byte", "val/code/loss")
    }
    assert "1.5000 bits per byte; web 1.5000 (1.0000 bits per byte); code 2.5000\n" in capsys.readouterr().out


def test_what_an_update_was_fed_is_written_when_it_is_due(metrics, tmp_path):
    metrics.fed(1, 255)
    assert not (tmp_path / "batches.jsonl").exists()
    metrics.flush()
    metrics.flush()
    assert read_rows(tmp_path / "batches.jsonl") == [{"update": 1, "hash": "00000000000000ff"}]


def test_what_is_not_finite_is_null_in_the_file(metrics, tmp_path):
    metrics.train(AXES, loss=800.0, lr=1e-3, grad_norm=1.0, tokens_per_second=1.0, data_wait=0.0, peak_gib=math.nan, more={})
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["train/perplexity"] is None
    assert row["memory/peak_gib"] is None


def test_rows_are_cut_back_to_a_checkpoint(tmp_path):
    rows = [
        {"update": 1, "train/loss": 3.0},
        {"update": 2, "train/loss": 2.0},
        {"update": 2, "val/loss": 2.0},
        {"update": 2, "task/words/accuracy": 0.5},
        {"update": 3, "train/loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"update": 3, "tr')
    samples = [{"update": update, "seed": 5, "prompt": "a", "text": "b", "set": None} for update in (1, 2)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    fed = [{"update": update, "hash": f"{update:016x}"} for update in (1, 2, 3)]
    (tmp_path / "batches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fed))
    (tmp_path / "guard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fed))
    cut_back(tmp_path, 2)
    assert read_rows(tmp_path / "guard.jsonl") == fed[:2]
    assert read_rows(tmp_path / "batches.jsonl") == fed[:2]
    assert read_rows(tmp_path / "metrics.jsonl") == rows[:2]
    assert read_rows(tmp_path / "samples.jsonl") == samples[:1]


@pytest.mark.parametrize(
    ("count", "said"), [(950, "950"), (8_192, "8K"), (1_638_400, "1638K"), (8_388_608, "8M"), (50_000_000_000, "50B")]
)
def test_counts(count, said):
    assert short_count(count) == said


@pytest.mark.parametrize(("seconds", "said"), [(0.44, "0.4s"), (53.2, "53s"), (250, "4m 10s"), (7_500, "2h 05m")])
def test_times(seconds, said):
    assert short_time(seconds) == said


def test_perplexity():
    assert perplexity(math.log(8192)) == pytest.approx(8192)
    assert perplexity(1e9) == math.inf
