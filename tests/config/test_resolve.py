"""What the machine decides, and what it refuses."""

import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llama_lab.config import devices
from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.resolve import resolve, tokens_at_once
from llama_lab.config.schema import Compile, Device, Precision, RunConfig
from llama_lab.training.saving.retention import checkpoint_due

HAS_CUDA = devices.probe_cuda().devices > 0
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="what Linux does")
without_cuda = pytest.mark.skipif(HAS_CUDA, reason="this machine has a GPU")


@pytest.mark.parametrize(
    ("words", "updates"),
    [
        ([], 125),
        (["eval.every_updates=30"], 120),
        (["eval.every_updates=200"], 200),
        (["eval.every_updates=1000"], 200),
        (["eval.every_updates=250"], 125),
        (["eval.every_updates=999"], 166.5),
        (["eval.every_updates=null"], 100),
        (["eval=null"], 100),
    ],
)
def test_checkpoints_are_spaced_by_validations(words: list[str], updates: float):
    for size in (4096, 65536):
        run = resolve(compose(["hardware=cpu", *words, f"data.tokens_per_update={size}", "training_tokens=655360000"]))
        assert run.checkpoint.every_tokens == updates * size
        if run.eval is not None and (run.eval.every_updates or 0) >= 100:
            assert checkpoint_due(run, run.eval.every_updates) and checkpoint_due(run, 2 * run.eval.every_updates)
        assert resolve(run) == run


def test_the_spacing_of_checkpoints_is_a_number_or_a_word():
    assert resolve(compose(["checkpoint.every_tokens=7000"])).checkpoint.every_tokens == 7000
    assert resolve(compose(["checkpoint.every_tokens=null"])).checkpoint.every_tokens is None
    with pytest.raises(ConfigError, match=r"checkpoint\.every_tokens=0 is below 1; null is only the last update"):
        compose(["checkpoint.every_tokens=0"])
    with pytest.raises(ConfigError, match=r"checkpoint\.every_tokens=often .*auto"):
        compose(["checkpoint.every_tokens=often"])


def on_cpu(*words: str) -> RunConfig:
    """A resolved run on the CPU."""
    return resolve(compose(["hardware=cpu", *words]))


def refusal(*words: str) -> str:
    """Why a run cannot be had here; one reason."""
    with pytest.raises(ConfigError) as caught:
        resolve(compose(list(words)))
    (problem,) = caught.value.problems
    return " ".join(problem)


def test_nothing_is_left_open_and_resolving_again_changes_nothing() -> None:
    run = resolve(compose([]))
    assert run.precision is not Precision.auto
    assert run.hardware.device is not Device.auto
    assert run.hardware.compile in (Compile.always, Compile.never)
    assert run.hardware.processes == 1
    assert run.hardware.micro_batch
    assert resolve(run) == run


def test_the_run_that_was_given_stays_as_it_is() -> None:
    run = compose([])
    resolve(run)
    assert run == compose([])


@pytest.mark.parametrize(
    ("words", "micro_batch"),
    [
        (["data.max_seq_len=256", "data.tokens_per_update=8192"], 16),
        (["data.max_seq_len=256", "data.tokens_per_update=1536"], 6),
        (["data.max_seq_len=64", "data.tokens_per_update=768"], 12),
        (["data.max_seq_len=8192", "data.tokens_per_update=24576"], 1),
        (["data.max_seq_len=1024", "data.tokens_per_update=7168"], 4),
        (["data.max_seq_len=1024", "data.tokens_per_update=10240"], 4),
        (["data.max_seq_len=1024", "data.tokens_per_update=9216"], 3),
        (["hardware.micro_batch=2"], 2),
    ],
)
def test_the_micro_batch_makes_the_fewest_even_passes_that_fit(words: list[str], micro_batch: int) -> None:
    assert on_cpu(*words).hardware.micro_batch == micro_batch


@pytest.mark.parametrize(
    ("model", "gigabytes", "precision", "tokens"),
    [
        ("llama_3m", 80, Precision.bf16, 131_072),
        ("llama_97m", 80, Precision.bf16, 131_072),
        ("llama_97m", 24, Precision.bf16, 37_793),
        ("seed_1b", 80, Precision.bf16, 18_371),
        ("seed_1b", 80, Precision.fp32, 9_185),
        ("seed_1b", 141, Precision.bf16, 37_607),
        ("seed_1b", 16, Precision.bf16, 0),
        ("llama_97m", 0, Precision.bf16, 16_384),
    ],
)
def test_on_a_gpu_memory_and_the_model_decide_how_many_tokens_pass_at_once(model, gigabytes, precision, tokens) -> None:
    gpu = devices.Cuda(devices=1, has_bf16=True, bytes=gigabytes * 10**9)
    run = compose([f"model={model}"])
    assert tokens_at_once(run, Device.cuda, gpu, precision) == tokens
    assert tokens_at_once(compose([f"model={model}", "hardware.micro_batch=auto"]), Device.cuda, gpu, precision) is None


@on_linux
def test_processes_share_an_update() -> None:
    run = on_cpu("hardware.processes=2", "data.tokens_per_update=8192", "data.max_seq_len=1024")
    assert (run.hardware.processes, run.hardware.micro_batch) == (2, 4)
    assert on_cpu("hardware.processes=null").hardware.processes == 1


@on_linux
def test_torchrun_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert on_cpu().hardware.processes == 4
    assert on_cpu("hardware.processes=4").hardware.processes == 4
    with pytest.raises(ConfigError, match="contradicts the 4 processes that were started; leave it out"):
        on_cpu("hardware.processes=2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert on_cpu().hardware.micro_batch == 6
    monkeypatch.setenv("WORLD_SIZE", "17")
    with pytest.raises(ConfigError, match="is 16 windows of 256, too few for 17 processes to have one each; at least 4352"):
        on_cpu()


def test_only_a_launcher_gives_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clusters set WORLD_SIZE for whatever is started."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert on_cpu().hardware.processes == 1


@on_linux
def test_under_a_launcher_each_machine_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "probe_cuda", lambda: devices.Cuda(devices=2, has_bf16=True, bytes=80 * 10**9))
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert resolve(compose(["hardware.device=cuda"])).hardware.processes == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "is more than there are GPUs: 2 GPUs are visible" in refusal("hardware.device=cuda")


def test_how_a_sweep_starts_its_runs_is_no_part_of_one_of_them() -> None:
    run = compose([])
    assert run.sweep is not None and resolve(run).sweep is None


def test_compile_and_precision_are_kept_where_they_are_typed() -> None:
    run = on_cpu("hardware.compile=always", "precision=bf16")
    assert run.hardware.compile is Compile.always
    assert run.precision is Precision.bf16
    assert on_cpu("hardware.compile=auto").hardware.compile is Compile.never


def test_windows_that_float8_cannot_multiply_are_refused() -> None:
    odd = ["hardware=cpu", "precision=fp8", "data.max_seq_len=1000", "data.tokens_per_update=8000", "training_tokens=1600000"]
    with pytest.raises(ConfigError, match=r"max_seq_len=1000 is no multiple of 16, .* precision=fp8 need it; 992 works, or"):
        resolve(compose(odd))
    assert "no multiple" not in refusal("hardware=cpu", "precision=fp8")


@on_linux
def test_a_cpu_computes_in_bf16_only_if_it_has_it() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    expected = Precision.bf16 if "avx512_bf16" in flags or "amx_bf16" in flags else Precision.fp32
    assert on_cpu().precision is expected


@pytest.mark.skipif(not importlib.metadata.version("torch").endswith("+cpu"), reason="this torch may have CUDA")
def test_cuda_without_a_cuda_build_of_torch_is_refused() -> None:
    assert refusal("hardware=gpu").startswith("hardware.device=cuda is not possible: the installed torch is a build without CUDA; ")


@without_cuda
def test_cuda_without_cuda_is_refused() -> None:
    line = refusal("hardware.device=cuda", "hardware.processes=1")
    assert line.startswith("hardware.device=cuda is not possible: ")
    assert line.endswith("hardware=cpu works without, and llama-lab plan --gpu H100 plans for one elsewhere")


@without_cuda
def test_the_driver_says_why_it_has_no_gpu() -> None:
    assert not devices._driver_devices(None).devices
    assert "NVIDIA driver" in devices._driver_devices(None).reason
    assert devices._driver_devices("").reason == "CUDA_VISIBLE_DEVICES='' hides every GPU; unset it"


@pytest.mark.skipif(sys.platform == "darwin", reason="this may be such a Mac")
def test_mps_elsewhere_is_refused() -> None:
    assert refusal("hardware=mps") == (
        "hardware.device=mps needs a Mac with Apple silicon and macOS 14 or later; hardware=auto takes what is here"
    )


@pytest.mark.skipif(sys.platform != "win32", reason="what Windows does")
def test_windows_has_one_process() -> None:
    assert (
        refusal("hardware=cpu", "hardware.processes=2")
        == "hardware.processes=2 needs Linux or macOS; on Windows hardware.processes=1 works"
    )


@pytest.mark.gpu
def test_gpus_are_counted_as_torch_counts_them() -> None:
    import torch

    cuda = devices.probe_cuda()
    assert cuda.devices == torch.cuda.device_count()
    assert cuda.has_bf16 == all(torch.cuda.get_device_capability(index) >= (8, 0) for index in range(cuda.devices))
    assert resolve(compose([])).hardware.device is Device.cuda
    assert (
        resolve(compose(["hardware=ddp", "data.tokens_per_update=2097152", "training_tokens=209715200"])).hardware.processes
        == cuda.devices
    )


@pytest.mark.gpu
def test_more_processes_than_gpus_are_refused() -> None:
    count = devices.probe_cuda().devices
    run = compose(["hardware.device=cuda"])
    hardware = replace(run.hardware, processes=2 * count)
    data = replace(run.data, tokens_per_update=run.data.max_seq_len * 2 * count)
    with pytest.raises(ConfigError, match=f"more than there are GPUs: .* hardware.processes={count} works"):
        resolve(replace(run, hardware=hardware, data=data))
