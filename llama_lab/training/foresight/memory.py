"""Running out of memory: what to type then, and `hardware.micro_batch=auto`, which finds the largest micro-batch that fits.

It is found by training two updates of each size that is tried, on the run's own data and model, in a process of its own: what that
process leaves on the device goes with it. What was found is kept in the cache folder, for the same model on the same device.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llama_lab.config import devices
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import plain_config, science
from llama_lab.config.schema import AUTO, Compile, RunConfig
from llama_lab.data.prepare import PreparedData
from llama_lab.training.errors import OutOfMemory
from llama_lab.training.foresight.gpu_memory import gpu_memory
from llama_lab.training.foresight.kept import keep, kept
from llama_lab.training.processes.ranks import end_with_parent
from llama_lab.training.processes.stop import blocked_signals, ignore_signals
from llama_lab.training.run_folder import package_version

MARGIN = 0.05
"""Share of the free memory that is left over: for what other libraries take, for validation, for holes between tensors."""
SIGNS = (
    "out of memory",
    "can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
NEARLY_ALL = 0.9
FOUND = "micro-batches"
"""Under which name the cache keeps what was found."""


def settle_micro_batch(run: RunConfig, data: PreparedData, say: Callable[[str], None], *, local_rank: int = 0) -> RunConfig:
    """The same run with `hardware.micro_batch=auto` replaced by the largest that fits on this machine's device.

    Args:
        run: resolved otherwise.
        local_rank: number of the GPU that it is tried on.

    Raises:
        ConfigError: not even one window fits, or trying it failed.
    """
    if run.hardware.micro_batch != AUTO:
        return run
    key, facts = _key(run, data)
    found = known_micro_batch(run, data)
    if found is not None:
        say(f"hardware.micro_batch=auto: {found}, as found before for this model on this device")
    else:
        say("hardware.micro_batch=auto: trying what fits, in a process of its own …")
        start = time.monotonic()
        found, free = _searched(run, data, local_rank)
        is_typical = free >= NEARLY_ALL
        kept_or_not = "kept for the next time" if is_typical else f"not kept, for others use {1 - free:.0%} of the device now"
        say(f"hardware.micro_batch=auto: {found}, found in {time.monotonic() - start:.0f} s; {kept_or_not}")
        if is_typical:
            keep(FOUND, {**kept(FOUND), key: {"micro_batch": found, "facts": facts}})
    return replace(run, hardware=replace(run.hardware, micro_batch=found))


def known_micro_batch(run: RunConfig, data: PreparedData) -> int | None:
    """What `hardware.micro_batch=auto` was found to be for such runs on this device; None if nobody has tried yet."""
    key, _ = _key(run, data)
    found = kept(FOUND).get(key, {}).get("micro_batch")
    return found if isinstance(found, int) and 1 <= found <= share_of(run) else None


def expected_micro_batch(run: RunConfig, data: PreparedData) -> RunConfig:
    """The same run with `hardware.micro_batch=auto` replaced by what was found before, or else by what the formula says fits.

    For plans alone: a run itself tries it.
    """
    if run.hardware.micro_batch != AUTO:
        return run
    found = known_micro_batch(run, data)
    if found is None:
        room, vocab_size = (1 - MARGIN) * devices.probe_cuda().bytes / 2**30, data.tokenizer.vocab_size
        found = largest(sizes(share_of(run)), lambda size: gpu_memory(run, vocab_size, size).gib < room) or 1
    return replace(run, hardware=replace(run.hardware, micro_batch=found))


def sizes(share: int) -> list[int]:
    """Micro-batches worth trying for so many windows, rising: the most windows at once in 1, 2, 3, … passes of even size."""
    return sorted({-(-share // passes) for passes in range(1, share + 1)})


def largest(candidates: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of some rising numbers that fits, given that all below one that fits do too; None if none does.

    The middle of what is left is asked each time, so that few are.
    """
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle + 1
        else:
            high = middle
    return candidates[low - 1] if low else None


def explained(error: BaseException, run: RunConfig, device: Any, place: str) -> BaseException:
    """The error itself, or, where it means that memory ran out, one that says what to type; caused by it.

    Args:
        device: the torch.device of the process.
        place: where it happened.
    """
    if not is_out_of_memory(error):
        return error
    size = min(run.micro_batch, share_of(run))
    held = ""
    if device.type == "cuda":
        import torch

        gib, total = torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.mem_get_info(device)[1] / 2**30
        held = f": {gib:.1f} of {total:.1f} GiB were allocated at most"
        _forget(run)
    advice = f"try hardware.micro_batch={size // 2}" if size > 1 else "try a smaller model, or a shorter data.max_seq_len"
    if size > 1 and device.type == "cuda":
        advice += ", or hardware.micro_batch=auto, which finds the largest that fits"
    name = {"cuda": "CUDA", "mps": "the GPU"}.get(device.type, "this machine")
    told = OutOfMemory(
        f"{name} has no memory left in {place} with hardware.micro_batch={size}{held}; {advice}. The curve stays the same"
    )
    told.__cause__ = error
    return told


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the machine has no memory left."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS))


def share_of(run: RunConfig) -> int:
    """Windows of an update that the process with the most of them computes."""
    return -(-run.windows_per_update // (run.hardware.processes or 1))


def _searched(run: RunConfig, data: PreparedData, local_rank: int) -> tuple[int, float]:
    """The largest micro-batch that fits, and the share of the device's memory that was free; found by a process of its own."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        # What a run before this one, in a notebook, has left in the allocator of this process.
        torch.cuda.empty_cache()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_search, args=(theirs, run, data, local_rank), name="micro-batch")
    with blocked_signals():
        process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        answer = f"the process that tried it ended with exit code {process.exitcode}"
    finally:
        if process.is_alive():
            process.kill()
        process.join()
    if isinstance(answer, str):
        raise ConfigError([("hardware.micro_batch=auto", f"could not be found: {answer}; type a number, or null")])
    found, free = answer
    if found is None:
        rule = f"finds no room for a window of data.max_seq_len={run.data.max_seq_len}; a smaller model or shorter windows may fit"
        raise ConfigError([("hardware.micro_batch=auto", rule)])
    return found, free


def _search(answer: Any, run: RunConfig, data: PreparedData, local_rank: int) -> None:
    """What that process does: it answers (micro-batch or None, free share), or why it could not."""
    ignore_signals()
    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    try:
        import torch

        from llama_lab.training.processes.worker import Place, join

        with tempfile.TemporaryDirectory(prefix="llama_lab-") as meeting:
            # In a process group where the run is in one, because data parallelism takes memory of its own.
            is_grouped = (run.hardware.processes or 1) > 1 or "RANK" in os.environ
            place = Place(0, 1, local_rank, f"file://{meeting}/store" if is_grouped else None)
            with join(run.hardware, place) as worker:
                free, total = torch.cuda.mem_get_info(worker.device)
                torch.cuda.set_per_process_memory_fraction((1 - MARGIN) * free / total, worker.device)
                answer.send((largest(sizes(share_of(run)), lambda size: _fits(run, data, worker, size)), free / total))
    except BaseException:
        answer.send(traceback.format_exc().strip().splitlines()[-1])


def _fits(run: RunConfig, data: PreparedData, worker: Any, size: int) -> bool:
    """Whether two updates with a micro-batch of `size` can be trained, the second without the allocator having to tidy up."""
    import torch

    try:
        return _tidied_up(run, data, worker, size) == 0
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    finally:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return False


def _tidied_up(run: RunConfig, data: PreparedData, worker: Any, size: int) -> int:
    """Train two updates and say how often the allocator had to return memory in the second, which would slow every update down."""
    import torch

    from llama_lab.data.stream import training_stream
    from llama_lab.model.llama import Llama
    from llama_lab.training.feed import Feed
    from llama_lab.training.optim import build_optimizer
    from llama_lab.training.update import Updater

    # Two micro-batches an update, where the share has two: the second meets the gradients of the first.
    windows = min(2 * size, share_of(run))
    run = replace(
        run,
        data=replace(run.data, tokens_per_update=windows * run.data.max_seq_len),
        hardware=replace(run.hardware, micro_batch=size, processes=1),
    )
    model = Llama(run.model, vocab_size=data.tokenizer.vocab_size, max_seq_len=run.data.max_seq_len)
    model.initialise(torch.Generator().manual_seed(0))
    model.to(worker.device)
    compiles = run.hardware.compile is Compile.always
    optimizer = build_optimizer(model, run.optim, worker.device.type, run.precision, compiles=compiles)
    before, stream = 0, training_stream(run, data)
    with Updater(model, run, worker) as updater, Feed(stream, run, worker, first_update=1, last_update=2) as feed:
        for update in (1, 2):
            before = torch.cuda.memory_stats(worker.device).get("num_alloc_retries", 0)
            gradients = updater.gradients(feed, update)
            updater.step(optimizer, update, unless=gradients.is_bad)
            torch.cuda.synchronize(worker.device)
    return torch.cuda.memory_stats(worker.device).get("num_alloc_retries", 0) - before


def _key(run: RunConfig, data: PreparedData) -> tuple[str, dict[str, Any]]:
    """Name of what was found in the cache, and everything that it depends on."""
    decisive, cuda = science(run), devices.probe_cuda()
    facts = {
        "model": decisive["model"],
        "optim": [decisive["optim"]["type"], plain_config(run)["optim"].get("state_dtype")],
        "precision": decisive["precision"],
        "vocab_size": data.tokenizer.vocab_size,
        "max_seq_len": run.data.max_seq_len,
        "window": run.data.window.name,
        "share": share_of(run),
        "processes": run.hardware.processes,
        "compile": run.hardware.compile.name,
        "recompute": run.hardware.recompute.name,
        "deterministic": run.hardware.deterministic,
        "device": cuda.name,
        "device_bytes": cuda.bytes,
        "torch": package_version("torch"),
        "llama_lab": package_version("llama_lab"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16], facts


def _forget(run: RunConfig) -> None:
    """Drop what was found for runs like this one, since it did not fit after all."""
    model = science(run)["model"]
    known = kept(FOUND)
    others = {key: entry for key, entry in known.items() if entry["facts"]["model"] != model}
    if len(others) < len(known):
        keep(FOUND, others)
