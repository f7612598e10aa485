"""Time by part, a run without a last checkpoint, and the profile."""

import gzip
import json

import pytest

from llama_lab import train
from llama_lab.config import devices
from llama_lab.training.metrics import read_rows

PARTS = {"speed/forward", "speed/backward", "speed/optimizer", "speed/rest"}


def test_parts_of_a_run_add_up_and_nothing_is_saved_at_its_end_where_that_is_not_wanted(tiny) -> None:
    words = ["log.parts=true", "checkpoint.every_tokens=null", "checkpoint.at_end=false", "profile=true"]
    result = train(tiny(*words))
    assert result.status == "finished"
    assert not list((result.folder / "checkpoints").glob("tokens-*"))
    rows = [row for row in read_rows(result.folder / "metrics.jsonl") if "train/loss" in row][1:]
    assert all(sum(row[part] for part in PARTS) == pytest.approx(1) for row in rows)
    assert all(row["speed/backward"] > row["speed/optimizer"] / 5 > 0 for row in rows)
    with gzip.open(result.folder / "profile" / "trace.json.gz") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert any("aten::bmm" in name for name in names)
    assert "aten::bmm" in (result.folder / "profile" / "kernels.txt").read_text()


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_a_gpu_s_peak_is_known_by_its_name(name: str, peak: float) -> None:
    assert devices.bf16_peak_flops(name) == peak
    assert devices.bf16_peak_flops("Some other card") is None
