"""`profile=true`: what the device and the host did in three updates, and what lay in the device's memory."""

import atexit
import ctypes
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llama_lab.config.disk import why
from llama_lab.config.schema import RunConfig
from llama_lab.training.clock import Clock
from llama_lab.training.console import Console
from llama_lab.training.processes.worker import Worker

FIRST, LAST = 6, 8
"""Updates of this start that are recorded: compiled by then, and the allocator has what it needs."""
ENTRIES = 200_000
"""Allocations that are kept at most."""
ROWS = 60


class Profiler:
    """Records on the first process, and writes into the run's folder `profile`. Does nothing where it was not asked for."""

    def __init__(self, run: RunConfig, folder: Path, worker: Worker, console: Console, clock: Clock) -> None:
        self._is_on = run.profile and worker.is_main
        self._folder, self._worker, self._console, self._clock = folder / "profile", worker, console, clock
        self._done = 0
        self._profile: profile | None = None

    def update(self) -> None:
        """Say that an update is done."""
        if not self._is_on:
            return
        self._done += 1
        if self._done == FIRST - 1:
            self._start()
        elif self._done == LAST:
            self.close()

    def close(self) -> None:
        """Write what was recorded; after the last update at the latest. That takes long, and is no training time."""
        if self._profile is not None:
            recorded, self._profile = self._profile, None
            with self._clock.excluded():
                try:
                    self._write(recorded)
                except OSError as error:
                    self._console.say(f"The profile could not be written ({why(error)}). Training goes on", style="yellow")

    def _write(self, recorded: profile) -> None:
        recorded.stop()
        self._folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(self._folder / "trace.json.gz"))
        on_cuda = self._worker.device.type == "cuda"
        order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=100)
        (self._folder / "kernels.txt").write_text(table, encoding="utf-8")
        files = "trace.json.gz (for ui.perfetto.dev), kernels.txt"
        if on_cuda:
            torch.cuda.memory._dump_snapshot(str(self._folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            atexit.register(_let_go_of_device)
            files += ", memory.pickle (for pytorch.org/memory_viz)"
        self._console.say(f"Profile of {self._done - FIRST + 1} updates in {self._folder}: {files}")

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._worker.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            # Python's frames alone: those of C++ take half a minute to name.
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES, stacks="python")
        self._worker.synchronise()
        # Cycles are not repeated, so nothing is cleared between them.
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()


def _let_go_of_device() -> None:
    """Detach CUDA's profiling interface, CUPTI, from a process that ends.

    It keeps buffers for each thread, and hands over those that are left when the device is released. That is after torch's profiler
    has been destroyed, which is to take them: without this, half of the profiled runs of one shape ended well and then aborted
    (torch 2.11, CUDA 13).
    """
    with suppress(OSError, RuntimeError, AttributeError):  # another system; a device that has failed
        torch.cuda.synchronize()
        loaded = {
            line.split(maxsplit=5)[-1].rstrip()
            for line in Path("/proc/self/maps").read_text().splitlines()
            if "/libcupti.so" in line
        }
        for path in loaded:
            cupti = ctypes.CDLL(path)
            cupti.cuptiActivityFlushAll(1)
            cupti.cuptiFinalize()
