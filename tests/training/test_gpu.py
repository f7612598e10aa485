"""The same runs on a real GPU."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_lab import train
from llama_lab.training.metrics import read_rows

from .conftest import assert_same_run, rewind, tiny_overrides
from .kill_runs import differences

pytestmark = pytest.mark.gpu


def losses(folder):
    return [row["train/loss"] for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]


def test_a_gpu_gives_the_curve_of_the_cpu(tiny):
    cpu = train(tiny("optim=adamw"))
    gpu = train(tiny("optim=adamw", "hardware=gpu", "name=gpu"))
    assert losses(gpu.folder) == pytest.approx(losses(cpu.folder), rel=1e-4)


def test_compiled_bf16_follows_the_fp32_curve(tiny):
    exact = train(tiny("hardware=gpu", "hardware.compile=never"))
    fast = train(tiny("hardware=gpu", "hardware.compile=always", "precision=bf16", "name=fast"))
    assert losses(fast.folder) == pytest.approx(losses(exact.folder), abs=0.05)


@pytest.mark.parametrize("compiled", ["never", "always"])
def test_packed_documents_train_as_on_a_cpu(tiny, compiled):
    # Five windows at once leave a smaller last micro-batch, which is filled up where the model is compiled.
    words = ["optim=adamw", "data.window=packed", "model.n_heads=4", "model.n_kv_heads=2", "hardware.micro_batch=5"]
    cpu = train(tiny(*words))
    gpu = train(tiny(*words, "hardware=gpu", f"hardware.compile={compiled}", "hardware.micro_batch=5", "name=gpu"))
    assert losses(gpu.folder) == pytest.approx(losses(cpu.folder), rel=1e-4)
    assert read_rows(gpu.folder / "batches.jsonl") == read_rows(cpu.folder / "batches.jsonl")


@pytest.mark.parametrize(
    "words",
    [
        ["precision=fp32", "hardware.compile=never"],
        ["precision=bf16", "hardware.compile=always"],
        ["precision=bf16", "hardware.compile=always", "hardware.recompute=full", "optim=adamw", "optim.state_dtype=bf16"],
        ["precision=fp8", "hardware.compile=always"],
    ],
    ids=lambda words: " ".join(words),
)
def test_deterministic_runs_repeat_and_go_on_bitwise(tiny, words):
    if "precision=fp8" in words and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    chosen = ["hardware=gpu", "hardware.deterministic=true", *words]
    first, second = (train(tiny(*chosen, f"name={name}")) for name in ("first", "second"))
    assert_same_run(first.folder, second.folder)
    unbroken = Path(shutil.copytree(second.folder, second.folder.parent.parent / "unbroken"))
    rewind(second.folder, 8)
    train(tiny(*chosen, "name=second"))
    assert differences(unbroken, second.folder) == []


def test_a_profiled_run_ends_well(outputs, text):
    batch = "data.max_seq_len=2048 data.tokens_per_update=32768 hardware.micro_batch=16"
    budget = "training_tokens=655360 schedule.warmup_updates=2"
    quiet = "wandb=null sample=null eval=null checkpoint.every_tokens=null checkpoint.at_end=false"
    words = (
        f"model=llama_97m data=text data.path={text} tokenizer=bytes {batch} {budget} {quiet} hardware=gpu profile=true fresh=true"
    )
    command = [sys.executable, "-m", "llama_lab", "train", *words.split()]
    # One of two once aborted after its last word.
    for _ in range(4):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout[-500:] + ended.stderr[-2000:]
        assert "memory.pickle" in ended.stdout


def test_one_process_under_torchrun_is_data_parallel_and_gives_the_same_run(tiny, text, outputs):
    alone = train(tiny("optim=adamw", "hardware=gpu", "hardware.micro_batch=4"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "llama_lab", "train"]
    words = [*start, *tiny_overrides(text), "optim=adamw", "hardware=ddp", "hardware.micro_batch=4", "name=torchrun"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    (folder,) = (outputs / "torchrun").glob("llama_3m*")
    assert losses(folder) == pytest.approx(losses(alone.folder), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_curve_of_one(tiny):
    one = train(tiny("optim=adamw", "hardware=gpu", "data.window=document"))
    two = train(tiny("optim=adamw", "hardware=ddp", "hardware.processes=2", "data.window=document", "name=two"))
    assert losses(two.folder) == pytest.approx(losses(one.folder), rel=1e-4)
