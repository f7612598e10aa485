"""One process of a run: its device, its rank, and what it agrees on with the others."""

import contextlib
import ctypes
import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous
from torch.utils import deterministic as torch_deterministic

from llama_lab.config.schema import Device, HardwareConfig, Precision
from llama_lab.training.compiled_files import keeping_compiled

LAUNCHED = "env://"
# What cuBLAS needs to be deterministic.
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# Until the first update is done: data is opened, checkpoints are read, kernels are compiled, by some ranks sooner than by others.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
# The watchdog, which says more, comes first; see `watchdog.py`.
LATER_THAN_WATCHDOG = 2.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands among the processes of its run.

    Attributes:
        rank, world_size: number of the process, and of processes.
        local_rank: number among the processes of this machine, which is the number of its GPU.
        rendezvous: address where the processes meet, as torch.distributed takes it; None for a process that meets nobody.
        local_world_size: number of processes of this machine; None: all of them are.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    rendezvous: str | None = None
    local_world_size: int | None = None

    @classmethod
    def from_environment(cls) -> "Place":
        """The place that torchrun gave this process in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank, local_world_size = os.environ.get("LOCAL_RANK", rank), os.environ.get("LOCAL_WORLD_SIZE", world_size)
        return cls(rank, world_size, int(local_rank), LAUNCHED, int(local_world_size))


@dataclass(slots=True)
class Worker:
    """A process that is ready to compute."""

    place: Place
    device: torch.device
    _seen_gib: float = field(default=0.0, init=False, repr=False, compare=False)

    def shorten_waits(self, seconds: float | None) -> None:
        """From now on fail in a collective that waits much longer for another process than the watchdog allows; None: as before."""
        if self.is_grouped and seconds is not None:
            distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=LATER_THAN_WATCHDOG * seconds + 60))

    @property
    def is_grouped(self) -> bool:
        """Whether this process belongs to a process group, if only its own."""
        return self.place.rendezvous is not None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, prints and talks to the tracker."""
        return self.place.rank == 0

    def agree(self, flag: bool) -> bool:
        """Whether any process says so. The flag stays on the host, so the GPU is not waited for."""
        if not self.is_grouped:
            return flag
        vote = torch.tensor(int(flag))
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        return bool(vote.item())

    def settle(self, flag: bool, number: int) -> tuple[bool, int]:
        """Whether any process says so, and the sum of a number from each modulo 2^64: one message between hosts an update."""
        if not self.is_grouped:
            return flag, number % 2**64
        # In halves, whose sums stay far inside the 64 bits of a message.
        message = torch.tensor([int(flag), number % 2**32, number % 2**64 >> 32])
        dist.all_reduce(message)
        asked, low, high = message.tolist()
        return asked > 0, (low + (high << 32)) % 2**64

    def agree_on(self, number: int) -> bool:
        """Whether every process has the same number."""
        if not self.is_grouped:
            return True
        ends = torch.tensor([number, -number])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        return bool(ends[0] == -ends[1])

    def heard(self, text: str | None) -> str | None:
        """What the first process says, on every process."""
        if not self.is_grouped:
            return text
        said = [text]
        dist.broadcast_object_list(said, device=torch.device("cpu"))
        return said[0]

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes of a tensor on the device, in place."""
        if self.is_grouped:
            dist.all_reduce(values)
        return values

    def autocast(self, precision: Precision) -> torch.autocast:
        """The context in which the model computes at `precision`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision is not Precision.fp32)

    def synchronise(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_gib(self) -> float:
        """Most memory held so far, in GiB: of the device, or of the process where the device is the CPU.

        MPS keeps no peak, and so it is the most of what this was asked for there.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.device.type == "mps":
            self._seen_gib = max(self._seen_gib, torch.mps.driver_allocated_memory() / 2**30)
            return self._seen_gib
        if sys.platform == "win32":
            return float("nan")
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _keep_freed_memory() -> None:
    """Have glibc reuse the memory of large tensors instead of handing it back to the kernel, which would clear every page anew.

    A fifth faster for a 3M model on two cores. It holds for the whole process and cannot be read back, so it is not undone; the
    price is that the process stays at its peak size. Other C libraries have no such switch.
    """
    if sys.platform != "linux":
        return
    mmap_threshold, trim_threshold, gib = -3, -1, 2**30
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, gib)
        library.mallopt(trim_threshold, 2 * gib - 1)


@contextmanager
def join(hardware: HardwareConfig, place: Place) -> Iterator[Worker]:
    """Make this process a worker: choose its device and threads, meet the others, and leave everything as it was found."""
    if hardware.device is Device.cuda:
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        torch.cuda.init()
        # An earlier run of this process may have held more.
        torch.cuda.reset_peak_memory_stats(device)
    else:
        device = torch.device(hardware.device.value)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills = torch_deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    neighbours = place.local_world_size or place.world_size
    if device.type == "cpu" and neighbours > 1:
        # Each process would start one thread a core and they would trample on each other.
        torch.set_num_threads(max(1, threads // neighbours))
    if device.type == "cpu":
        _keep_freed_memory()
    workspace = os.environ.get(WORKSPACE)
    if hardware.deterministic:
        os.environ.setdefault(WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling memory that is about to be written shows reads of what nobody wrote; repeats are equal without.
        torch_deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    compiled = contextlib.ExitStack()
    compiled.enter_context(keeping_compiled(hardware))
    try:
        if place.rendezvous is not None:
            store, _, _ = next(rendezvous(place.rendezvous, place.rank, place.world_size, timeout=COLLECTIVE_TIMEOUT))
            # torchrun keeps its store when it starts the processes again; without a prefix they would meet their dead forerunners.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"attempt {attempt}", store),
                rank=place.rank,
                world_size=place.world_size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=device if device.type == "cuda" else None,
            )
        yield Worker(place, device)
        if place.rendezvous is not None:
            # Not after an error: leaving is collective, and the others may be waiting in another call.
            dist.destroy_process_group()
    finally:
        compiled.close()
        torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() is not deterministic:  # setting it imports a compiler, for seconds
            torch.use_deterministic_algorithms(deterministic)
        torch_deterministic.fill_uninitialized_memory = fills  # pyright: ignore[reportAttributeAccessIssue]
        if hardware.deterministic and workspace is None:
            os.environ.pop(WORKSPACE, None)
