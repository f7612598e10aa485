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
    [
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("A100-PCIE-40GB", 312e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX 6000 Ada Generation", 364e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
    ],
)
def test_a_gpu_s_peak_is_known_by_its_name(name: str, peak: float) -> None:
    assert devices.bf16_peak_flops(name) == peak


@pytest.mark.parametrize(
    "name",
    [
        "Some other card", "", "Tesla V100-SXM2-16GB", "NVIDIA RTX A1000", "NVIDIA RTX A400", "NVIDIA RTX A4000", "NVIDIA A10G",
        "NVIDIA H20", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    ],
)  # fmt: skip
def test_a_name_that_only_holds_a_known_one_has_no_peak(name: str) -> None:
    assert devices.bf16_peak_flops(name) is None
