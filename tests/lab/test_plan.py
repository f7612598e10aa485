"""What `llama-lab plan` says, held against what a run then does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_lab.cli import main
from llama_lab.config.compose import compose
from llama_lab.config.devices import in_place_of, named_gpus, probe_cuda
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import run_folder
from llama_lab.config.resolve import resolve
from llama_lab.data.prepare import prepare
from llama_lab.lab.plan import Plan, show
from llama_lab.model.count import parameters

Output = pytest.CaptureFixture[str]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """40 short documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Document {number} of forty. " * 20, encoding="utf-8")
    return folder


def shown(capsys: Output) -> dict[str, str]:
    """First two columns of what was printed."""
    lines = [line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return {line[0].strip(): line[-1].strip() for line in lines}


def test_counts_follow_from_config_and_data(text: Path, outputs: Path, capsys: Output):
    words = ["data=text", f"data.path={text}", "data.max_seq_len=64", "data.tokens_per_update=1024", "tokenizer=bytes"]
    words += [
        "training_tokens=40_000",
        "schedule.warmup_updates=2",
        "checkpoint.every_tokens=10_000",
        "hardware=cpu",
        "precision=fp32",
    ]
    show(words)
    said = shown(capsys)
    run = resolve(compose(words))
    data = prepare(run.data, run.tokenizer, print)
    assert said["updates"] == "39"
    assert said["training tokens"] == f"{39 * 1024:,}"
    assert said["parameters"] == f"{parameters(run.model, 257):,}"
    epochs = 39 * 16 / ((data.train.tokens - 1) // 64)
    assert said["epochs"] == f"{epochs:.1f} epochs: each text is seen {int(epochs)} or {int(epochs) + 1} times"
    assert said["windows an update"].startswith("16 of 64 tokens: 1 process x ")
    assert said["device"] == "cpu, fp32"
    assert said["checkpoints"].startswith("4 written, ")
    assert ", at most 4 at once (2 newest, the best, 1 being written), " in said["checkpoints"]
    assert said["run folder"] == f"{run_folder(run)} (new)"
    assert not outputs.exists()


def test_what_is_known_without_the_data_is_said(capsys: Output):
    show(["data=shards", "data.path=nowhere", "model=seed_1b", "tokenizer.vocab_size=8192", "hardware=cpu"])
    printed = capsys.readouterr().out
    assert "1,266,780,160" in printed
    assert "data.path=nowhere" in printed
    assert "epochs" not in printed


def test_a_gpu_that_is_elsewhere_is_planned_for(text: Path, capsys: Output):
    here = probe_cuda()
    words = [
        "data=text",
        f"data.path={text}",
        "tokenizer=bytes",
        "model=llama_97m",
        "data.max_seq_len=64",
        "training_tokens=40_000",
    ]
    words += ["data.tokens_per_update=2048", "schedule.warmup_updates=2", "optim=adamw"]
    assert main(["plan", "--gpu", "2xH100", *words]) == 0
    said = shown(capsys)
    assert said["device"] == "cuda, bf16, as if on 2 NVIDIA H100 80GB HBM3; hardware=ddp takes all 2"
    assert "more than" not in said["memory"]
    assert probe_cuda() == here
    assert main(["plan", *words, "hardware=ddp", "--gpu=2xA100 40GB", "-m", "seed.init=0,1", "budget.gpu_hour_price=2"]) == 0
    assert "NVIDIA A100 40GB is not known without a probe: --probe there measures ten updates" in capsys.readouterr().out
    assert main(["plan", *words, "hardware=cpu", "--gpu", "H100"]) == 0
    assert shown(capsys)["device"].startswith("cpu, ")


def minutes(said: str) -> int:
    """Of `2h 05m`."""
    whole, rest = said.split()
    return 60 * int(whole.removesuffix("h")) + int(rest.removesuffix("m"))


def test_what_a_run_takes_at_least_is_said_where_no_more_is_known(text: Path, capsys: Output):
    words = ["data=text", f"data.path={text}", "tokenizer=bytes", "model=llama_97m", "data.max_seq_len=2048", "hardware=ddp"]
    words += ["data.tokens_per_update=131072", "training_tokens=10_000_000_000", "budget.gpu_hour_price=2"]
    said = {}
    for gpus in ("1xH100", "2xH100", "2xA100 40GB"):
        assert main(["plan", "--gpu", gpus, *words]) == 0
        said[gpus] = shown(capsys)
    (hours,) = map(float, re.findall(r"([\d.]+)", said["1xH100"]["GPU hours"])[:1])
    flops = float(said["1xH100"]["FLOPs in total"])
    bounds = {gpus: re.match(r"at least (.+), ([\d.]+) GPU hours, ([\d.]+) at 2 an hour \(", said[gpus]["time"]) for gpus in said}
    assert bounds.pop("1xH100") is None
    two, other = (bound.groups() if bound else ("", "0", "0") for bound in bounds.values())
    assert float(two[1]) == hours
    assert minutes(two[0]) == pytest.approx(hours * 60 / 2, rel=0.02)
    assert "(if 2 GPUs are 2 times one); how fast" in said["2xH100"]["time"]
    assert float(other[1]) == pytest.approx(flops / 312e12 / 3600, rel=0.01)
    assert float(other[2]) == pytest.approx(2 * flops / 312e12 / 3600, rel=0.01)
    assert "(at the whole of its peak); how fast" in said["2xA100 40GB"]["time"]


def test_what_does_not_fit_into_a_gpu_is_said_with_what_does(text: Path, capsys: Output):
    words = [
        "data=text",
        f"data.path={text}",
        "tokenizer=bytes",
        "model=seed_1b",
        "data.max_seq_len=2048",
        "training_tokens=1_000_000",
    ]
    words += ["data.tokens_per_update=32768", "schedule.warmup_updates=2"]
    advice = {}
    for asked in ("hardware.micro_batch=8", "model.n_layers=60", "hardware.micro_batch=1"):
        assert main(["plan", "--gpu", "4090", *words, asked]) == 0
        advice[asked] = shown(capsys)["memory"]
    typed = re.search(
        r"more than the 23\.76 of the GPU: hardware\.micro_batch=(\d) would take 2\d\.\d\d;", advice["hardware.micro_batch=8"]
    )
    assert typed is not None and 1 <= int(typed[1]) < 8
    assert "try optim.state_dtype=bf16, hardware.recompute=full or a smaller model" in advice["model.n_layers=60"]
    assert "more than" not in advice["hardware.micro_batch=1"]


@pytest.mark.parametrize(
    ("typed", "name", "gib", "has_fp8"),
    [
        ("H100", "NVIDIA H100 80GB HBM3", 79.2, True),
        ("8 x h100 sxm5", "NVIDIA H100 80GB HBM3", 79.2, True),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", 79.2, True),
        ("h100-pcie", "NVIDIA H100 PCIe 80GB", 79.2, True),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 40GB", 39.6, False),
        ("4x4090", "NVIDIA RTX 4090 24GB", 23.76, True),
        ("NVIDIA GeForce RTX 3090", "NVIDIA RTX 3090 24GB", 23.76, False),
    ],
)
def test_gpus_are_known_by_the_names_that_people_and_drivers_give_them(typed: str, name: str, gib: float, has_fp8: bool):
    found = named_gpus(typed)
    assert (found.name, found.bytes / 2**30, found.has_fp8) == (name, pytest.approx(gib), has_fp8)
    assert found.devices == (int(typed[0]) if typed[0].isdigit() else 1)
    with in_place_of(found):
        assert probe_cuda() is found


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("4xA100", "comes with 40 or 80 GB; type --gpu '4xA100 80GB'"),
        ("A100 60GB", "comes with 40 or 80 GB"),
        ("RTX 4090 Ti", "is no GPU that is known here; there are A10, A100"),
        ("0xH100", "is no GPU that is known here"),
        ("GPU", "is no GPU that is known here"),
    ],
)
def test_a_gpu_that_nobody_knows_is_refused_with_those_that_are(typed: str, said: str):
    with pytest.raises(ConfigError) as caught:
        named_gpus(typed)
    assert f"--gpu {typed} {said}" in str(caught.value)


def test_a_sweep_is_planned_run_by_run(text: Path, capsys: Output):
    words = ["data=text", f"data.path={text}", "tokenizer=bytes", "hardware=cpu", "model.n_layers=1,2"]
    show(words, multirun=True)
    printed = capsys.readouterr().out
    assert "Plan of 2 runs" in printed
    assert printed.count("  new  ") == 2
    assert f"In total: {2 * compose([]).training_tokens:,} tokens" in printed


def test_planning_needs_no_torch(text: Path):
    words = ["plan", "data=text", f"data.path={text}", "hardware=cpu"]
    code = f"import sys; from llama_lab.cli import main; code = main({words!r}); sys.exit(code or ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout


def test_the_size_of_a_checkpoint_is_what_was_said(llama_lab):
    words = ["experiment=smoke", "hardware=cpu", "eval=null", "sample=null", "optim=muon", "model.dim=128"]
    done = llama_lab("train", *words)
    assert done.returncode == 0, done.stderr
    run = resolve(compose(words))
    plan = Plan(run, run_folder(run), prepare(run.data, run.tokenizer, print), None)
    assert plan.status == "finished"
    kept = [manifest.parent for manifest in plan.folder.glob("checkpoints/*/manifest.json")]
    assert plan.checkpoints is not None
    assert len(kept) == plan.checkpoints.written == 2
    size = sum(file.stat().st_size for file in kept[-1].iterdir())
    assert size == pytest.approx(plan.checkpoints.each, rel=0.05)
