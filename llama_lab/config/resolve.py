"""What a run leaves open made concrete: device, processes, micro-batch, compile and precision by the machine, the spacing of
checkpoints by its validations. Torch-free."""

import os
import sys
from dataclasses import replace

from llama_lab.config import devices
from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import AUTO, Compile, Device, Precision, Problem, RunConfig
from llama_lab.config.validate import too_many_processes

CPU_MICRO_BATCH_TOKENS = 4096
UNKNOWN_MICRO_BATCH_TOKENS = 16384
"""Where the memory of the device is not known."""
GPU_MICRO_BATCH_TOKENS = 131072
"""More are no faster: at that size an H100 waits for no kernel of llama_97m, and 65,536 tokens were 2 % slower."""
GPU_STATE_BYTES = 18
"""A weight, its copy in bf16, its gradient and two moments."""
BLOCK_WEIGHTS = 12
"""In a block, as a multiple of its width squared: four for attention, eight for SwiGLU."""
GPU_NUMBERS_PER_BYTE = 0.0155
"""Tokens x channels x blocks at once for each byte that weights and states leave of a GPU's memory, in bf16. Training keeps about
29 bytes of each (`training.foresight.gpu_memory`), so nearly half of those bytes: 16,384 tokens of seed_1b took 42 GiB in all, and
131,072 of llama_97m 34."""

LEAST_UPDATES_BETWEEN_SAVES, MOST_UPDATES_BETWEEN_SAVES = 100, 200
"""What is written grows with the model, and so does the time of an update: a number of updates costs all models about alike."""

# Positions of a float8 product; widths that do not fit stay in bfloat16 (`model.products`).
FP8_MULTIPLE = 16


def resolve(run: RunConfig) -> RunConfig:
    """The same run with every `auto` and derived null replaced: in `hardware` and `precision` by what this machine makes of it.

    One is left, because finding it takes minutes on the device: `hardware.micro_batch=auto` on CUDA, which the start of the run
    replaces (`training.foresight.memory`).

    Under torchrun or srun (WORLD_SIZE is set) the processes are those that were started.

    Returns:
        A new config; `run` is unchanged. Resolving it again changes nothing.

    Raises:
        ConfigError: this machine cannot run it as it says.
    """
    cuda = devices.probe_cuda()
    device, found = _device(run, cuda)
    processes, more = _processes(run, device, cuda)
    found += more
    precision = _precision(run, device, cuda, found)
    found += too_many_processes(run, processes)
    micro_batch = _micro_batch(run, processes, tokens_at_once(run, device, cuda, precision))
    if found:
        raise ConfigError(found)
    compiles = run.hardware.compile is Compile.always
    if run.hardware.compile is Compile.auto:
        compiles = device is Device.cuda and (sys.platform == "linux" or not cuda.is_here)
    hardware = replace(
        run.hardware,
        device=device,
        processes=processes,
        micro_batch=micro_batch,
        compile=Compile.always if compiles else Compile.never,
    )
    checkpoint = replace(run.checkpoint, every_tokens=_every_tokens(run))
    # How a sweep starts its runs says nothing about one of them.
    return replace(run, precision=precision, hardware=hardware, checkpoint=checkpoint, sweep=None)


def _device(run: RunConfig, cuda: devices.Cuda) -> tuple[Device, list[Problem]]:
    asked = run.hardware.device
    if asked is Device.auto:
        return (Device.cuda if cuda.devices else Device.mps if devices.has_mps() else Device.cpu), []
    if asked is Device.cuda and not cuda.devices:
        rule = f"is not possible: {cuda.reason}; hardware=cpu works without, and llama-lab plan --gpu H100 plans for one elsewhere"
        return asked, [("hardware.device=cuda", rule)]
    if asked is Device.mps and not devices.has_mps():
        rule = f"needs a Mac with Apple silicon and macOS {devices.MPS_MACOS} or later; hardware=auto takes what is here"
        return asked, [("hardware.device=mps", rule)]
    return asked, []


def _processes(run: RunConfig, device: Device, cuda: devices.Cuda) -> tuple[int, list[Problem]]:
    asked, started = run.hardware.processes, _started_processes()
    processes = started or asked or (max(cuda.devices, 1) if device is Device.cuda else 1)
    subject = f"hardware.processes={processes}"
    if started and asked not in (None, 1, started):
        return started, [(f"hardware.processes={asked}", f"contradicts the {started} processes that were started; leave it out")]
    if processes == 1:
        return 1, []
    if sys.platform == "win32":
        return processes, [(subject, "needs Linux or macOS; on Windows hardware.processes=1 works")]
    if device is Device.mps:
        return processes, [(subject, "cannot share the one GPU of a Mac; hardware.processes=1, or hardware.device=cpu as well")]
    # Under torchrun each machine brings GPUs of its own.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) if started else processes
    if device is Device.cuda and 0 < cuda.devices < here:
        gpus = "1 GPU is" if cuda.devices == 1 else f"{cuda.devices} GPUs are"
        return processes, [(subject, f"is more than there are GPUs: {gpus} visible; hardware.processes={cuda.devices} works")]
    return processes, []


def _started_processes() -> int | None:
    """Processes of the launcher that started this one; none if there is no launcher."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def _precision(run: RunConfig, device: Device, cuda: devices.Cuda, found: list[Problem]) -> Precision:
    """bf16 on a CPU without it in hardware is allowed when typed: slow, but how a GPU's curve is repeated without one."""
    if run.precision is Precision.auto:
        has_bf16 = {Device.cuda: cuda.has_bf16, Device.cpu: devices.cpu_has_bf16()}.get(device, False)
        return Precision.bf16 if has_bf16 else Precision.fp32
    if run.precision is Precision.bf16 and device is Device.cuda and cuda.devices and not cuda.has_bf16:
        found.append(("precision=bf16", "needs a GPU of compute capability 8.0 (Ampere) or later; precision=fp32 works here"))
    if run.precision is Precision.fp8 and run.data.max_seq_len % FP8_MULTIPLE:
        near = max(FP8_MULTIPLE, round(run.data.max_seq_len / FP8_MULTIPLE) * FP8_MULTIPLE)
        rule = f"is no multiple of {FP8_MULTIPLE}, as the products of precision=fp8 need it; {near} works, or precision=bf16"
        found.append((f"data.max_seq_len={run.data.max_seq_len}", rule))
    if run.precision is Precision.fp8 and not (device is Device.cuda and cuda.has_fp8):
        found.append(("precision=fp8", "needs a GPU of compute capability 8.9 (Ada, Hopper) or later; precision=auto works here"))
    return run.precision


def _micro_batch(run: RunConfig, processes: int, tokens: int | None) -> int | str:
    """Windows at once: as typed, else a process's share in the fewest passes of even size that keep to so many tokens.

    Args:
        tokens: None: that is found by trying, when the run starts.
    """
    asked = run.hardware.micro_batch
    if tokens is None or asked not in (None, AUTO):
        return asked
    share = -(-run.windows_per_update // processes)
    limit = max(1, tokens // run.data.max_seq_len)
    passes = -(-share // limit)
    return -(-share // passes)


def _every_tokens(run: RunConfig) -> int | None:
    """Tokens between two checkpoints: as typed, else such that one falls on every validation, or where they are frequent on every
    few of them, with neither too few nor too many updates between two."""
    asked = run.checkpoint.every_tokens
    if asked != AUTO:
        return asked
    interval = (None if run.eval is None else run.eval.every_updates) or LEAST_UPDATES_BETWEEN_SAVES
    tokens = -(-LEAST_UPDATES_BETWEEN_SAVES // interval) * interval * run.data.tokens_per_update
    parts = -(-interval // MOST_UPDATES_BETWEEN_SAVES)
    while tokens % parts:
        parts += 1
    return tokens // parts


def tokens_at_once(run: RunConfig, device: Device, cuda: devices.Cuda, precision: Precision) -> int | None:
    """Tokens in a micro-batch that nobody has chosen; None where the device is to be asked."""
    if device is Device.cuda and run.hardware.micro_batch == AUTO:
        return None
    if device is not Device.cuda or not cuda.bytes:
        return CPU_MICRO_BATCH_TOKENS if device is Device.cpu else UNKNOWN_MICRO_BATCH_TOKENS
    channels = run.model.dim * run.model.n_layers
    states = GPU_STATE_BYTES * BLOCK_WEIGHTS * run.model.dim * channels
    numbers = max(0, cuda.bytes - states) * GPU_NUMBERS_PER_BYTE / (2 if precision is Precision.fp32 else 1)
    return min(GPU_MICRO_BATCH_TOKENS, int(numbers / channels))
