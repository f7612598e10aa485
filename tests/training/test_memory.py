"""Memory that runs out, and the micro-batch that fits."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_lab import compose, train
from llama_lab.config.errors import ConfigError
from llama_lab.config.resolve import resolve
from llama_lab.data.prepare import prepare
from llama_lab.training.errors import OutOfMemory
from llama_lab.training.foresight import memory
from llama_lab.training.foresight.kept import keep, kept
from llama_lab.training.metrics import read_rows
from llama_lab.training.processes.worker import Place, Worker

from .conftest import tiny_overrides
from .processes import folder_of, status_of


@pytest.mark.parametrize("share", [1, 2, 7, 12, 30, 64, 97])
def test_sizes_are_the_smallest_for_each_number_of_passes(share: int) -> None:
    passes = {size: -(-share // size) for size in range(1, share + 1)}
    expected = [size for size in passes if size == 1 or passes[size - 1] > passes[size]]
    assert memory.sizes(share) == expected
    assert memory.sizes(share)[0] == 1
    assert memory.sizes(share)[-1] == share


@pytest.mark.parametrize("share", [1, 2, 5, 24, 512])
def test_the_largest_that_fits_is_found_with_few_trials(share: int) -> None:
    candidates = memory.sizes(share)
    for limit in range(share + 2):
        tried: list[int] = []

        def fits(size: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= limit

        expected = max((size for size in candidates if size <= limit), default=None)
        assert memory.largest(candidates, fits) == expected
        assert len(tried) <= len(candidates).bit_length()


def test_on_a_cpu_auto_is_what_null_is() -> None:
    words = ["hardware=cpu", "data.tokens_per_update=8192"]
    auto = resolve(compose([*words, "hardware.micro_batch=auto"]))
    assert auto.hardware == resolve(compose([*words, "hardware.micro_batch=null"])).hardware
    assert auto.micro_batch == 16


@pytest.mark.parametrize("value", ["atuo", "1.5", "true", "'8'", "[4]"])
def test_what_is_no_micro_batch_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a whole number, auto or null; e\.g\. hardware\.micro_batch="):
        compose([f"hardware.micro_batch={value}"])


def test_what_is_no_micro_batch_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hardware").mkdir()
    option = "device: cpu\nprocesses: 1\nmicro_batch: atuo\ncompile: never\ndeterministic: false\n"
    (tmp_path / "hardware" / "own.yaml").write_text(option)
    with pytest.raises(ConfigError, match=r"hardware\.micro_batch=atuo is not a whole number, auto or null"):
        compose(["hardware=own"], config_dir=tmp_path)


def test_what_was_found_is_used_again_and_forgotten_once_it_did_not_fit(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path))
    run = resolve(tiny())
    data = prepare(run.data, run.tokenizer, lambda text: None)
    open_run = replace(run, hardware=replace(run.hardware, micro_batch="auto"))
    key, facts = memory._key(open_run, data)
    keep(memory.FOUND, {key: {"micro_batch": 5, "facts": facts}})
    said: list[str] = []
    assert memory.settle_micro_batch(open_run, data, said.append).micro_batch == 5
    assert said == ["hardware.micro_batch=auto: 5, as found before for this model on this device"]
    assert memory.settle_micro_batch(run, data, said.append) is run
    other = replace(open_run, hardware=replace(open_run.hardware, processes=2))
    assert memory._key(other, data)[0] != key
    memory._forget(run)
    assert kept(memory.FOUND) == {}
    (tmp_path / "micro-batches.json").write_text("no json")
    assert kept(memory.FOUND) == {}


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes.",
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
    ],
)
def test_what_torch_says_without_memory_is_known(message: str) -> None:
    assert memory.is_out_of_memory(RuntimeError(message))
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_where_the_device_keeps_no_peak_the_most_that_was_seen_is_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([2 * 2**30, 3 * 2**30, 2**30])
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: next(held))
    worker = Worker(Place(), torch.device("mps"))
    assert [worker.peak_gib() for _ in range(3)] == [2.0, 3.0, 3.0]


# A machine with little memory, as far as this process can tell. The limit counts what is mapped, the code of libraries included.
LITTLE = """
import resource, sys
from llama_lab.cli import main
import torch
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30, mapped + 2**30))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_a_machine_without_memory_says_what_to_type(text: Path, outputs: Path) -> None:
    large = ["data.tokens_per_update=2097152", "training_tokens=20971520", "hardware.micro_batch=65536", "eval=null", "sample=null"]
    words = [sys.executable, "-c", LITTLE, "train", *tiny_overrides(text), *large, "name=little"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=170)
    assert done.returncode == 1, done.stderr
    assert done.stderr.rstrip().endswith(
        "OutOfMemory: this machine has no memory left in update 1 with hardware.micro_batch=65536; "
        "try hardware.micro_batch=32768. The curve stays the same"
    )
    assert "Traceback" not in done.stderr
    assert status_of(outputs, "little") == "failed"
    folder = folder_of(outputs, "little")
    assert json.loads((folder / "summary.json").read_text())["error"].startswith("OutOfMemory: ")
    assert "Traceback" in (folder / "train.log").read_text()


LARGE = [
    *("model.dim=1024", "model.n_layers=8", "model.n_heads=8", "optim=adamw", "precision=bf16", "hardware=gpu"),
    *("data.max_seq_len=2048", "data.tokens_per_update=2097152", "training_tokens=4194304", "data.window=document"),
    *("eval=null", "sample=null", "schedule.warmup_updates=1", "log.every_updates=1", "checkpoint.every_tokens=null"),
    "hardware.compile=never",
]


@pytest.fixture
def cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.gpu
def test_auto_finds_what_fills_the_device_and_keeps_it(tiny, cold_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tiny(*LARGE, "hardware.micro_batch=auto"))
    assert result.status == "finished"
    said = capsys.readouterr().out
    found = re.search(r"hardware\.micro_batch=auto: (\d+), found in \d+ s; kept for the next time", said)
    assert found is not None, said
    size = int(found[1])
    assert f"micro_batch: {size}\n" in (result.folder / "config.yaml").read_text()
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    peak = max(row["memory/peak_gib"] for row in read_rows(result.folder / "metrics.jsonl") if "memory/peak_gib" in row)
    sizes = memory.sizes(1024)
    assert 1 < size < 1024
    # The next larger one would hardly have fitted: memory grows at most as fast as the micro-batch, and holes take their part.
    larger = sizes[sizes.index(size) + 1]
    assert peak < total
    assert peak * larger / size > (1 - memory.MARGIN) * total * 0.8
    (kept,) = json.loads((cold_cache / "micro-batches.json").read_text()).values()
    assert kept["micro_batch"] == size
    assert kept["facts"]["device"] == torch.cuda.get_device_name(0)

    again = train(tiny(*LARGE, "hardware.micro_batch=auto", "name=again"))
    assert f"hardware.micro_batch=auto: {size}, as found before" in capsys.readouterr().out
    fewer = train(tiny(*LARGE, f"hardware.micro_batch={size // 2}", "name=fewer"))
    curves = [
        [row["train/loss"] for row in read_rows(run.folder / "metrics.jsonl") if "train/loss" in row]
        for run in (result, again, fewer)
    ]
    for curve, other in itertools.pairwise(curves):
        assert curve == pytest.approx(other, rel=1e-3)


@pytest.mark.gpu
def test_a_micro_batch_beyond_the_device_says_what_to_type(tiny, outputs: Path, cold_cache: Path) -> None:
    with pytest.raises(OutOfMemory) as caught:
        train(tiny(*LARGE, "hardware.micro_batch=1024", "name=beyond"))
    assert re.fullmatch(
        r"CUDA has no memory left in update 1 with hardware\.micro_batch=1024: \d+\.\d of \d+\.\d GiB were allocated at most; "
        r"try hardware\.micro_batch=512, or hardware\.micro_batch=auto, which finds the largest that fits\. "
        r"The curve stays the same",
        str(caught.value),
    )
    assert status_of(outputs, "beyond") == "failed"


@pytest.mark.gpu
def test_auto_works_under_torchrun(text: Path, outputs: Path, cold_cache: Path) -> None:
    words = [*tiny_overrides(text), "hardware=ddp", "hardware.micro_batch=auto", "hardware.compile=never", "name=torchrun"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "llama_lab", "train"]
    done = subprocess.run([*start, *words], capture_output=True, text=True, timeout=170, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "hardware.micro_batch=auto: 16, found in" in done.stdout
    assert "micro_batch: 16\n" in (folder_of(outputs, "torchrun") / "config.yaml").read_text()
