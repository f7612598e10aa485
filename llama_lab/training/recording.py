"""The rows of a run's log: where they go, and what each says of the updates since the row before."""

import math

import torch
from torch import Tensor

from llama_lab.config.devices import bf16_peak_flops
from llama_lab.config.schema import Precision, RunConfig
from llama_lab.data.prepare import PreparedData
from llama_lab.data.stream import MixedStream
from llama_lab.model.count import flops_per_token
from llama_lab.training.clock import Clock
from llama_lab.training.console import Console
from llama_lab.training.guard import Guard
from llama_lab.training.metrics import Metrics
from llama_lab.training.observing import axes
from llama_lab.training.processes.worker import Worker
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.state import State
from llama_lab.training.tracking.tracker import Tracker


def open_metrics(
    run: RunConfig, folder: RunFolder, data: PreparedData, state: State, console: Console, tracker: Tracker
) -> Metrics:
    """What the rows of this start are written with."""
    return Metrics(
        folder,
        console,
        tracker,
        vocab_size=data.tokenizer.vocab_size,
        total_tokens=run.updates * run.data.tokens_per_update,
        start_tokens=state.update * run.data.tokens_per_update,
    )


def record(
    run: RunConfig,
    data: PreparedData,
    state: State,
    worker: Worker,
    metrics: Metrics | None,
    guard: Guard,
    clock: Clock,
    factor: float,
    grad_norm: Tensor,
    waited: float,
    more: dict[str, float],
) -> None:
    """Record the mean loss since the last row. All ranks take part; the device is waited for here and nowhere else."""
    guard.look()
    loss_sum, predicted = worker.total(torch.stack((state.loss_sum, state.predicted))).tolist()
    loss = loss_sum / predicted if predicted else math.nan  # every update since the row before was left out
    state.loss_sum.zero_()
    state.predicted.zero_()
    if metrics is not None:
        tokens_per_second, data_wait = clock.lap(waited)
        metrics.train(
            axes(run, state.update, clock),
            loss=loss,
            lr=factor * run.optim.max_lr,
            grad_norm=float(grad_norm),
            tokens_per_second=tokens_per_second,
            data_wait=data_wait,
            peak_gib=worker.peak_gib(),
            more=more | utilisation(run, data, tokens_per_second, worker) | guard.marks(state.update, loss),
        )


def utilisation(run: RunConfig, data: PreparedData, tokens_per_second: float, worker: Worker) -> dict[str, float]:
    """Share of what the devices could compute in bf16 that the model's own operations took, by metric key; nothing where that is
    not known, or in fp32."""
    if worker.device.type != "cuda" or run.precision is Precision.fp32:
        return {}
    peak = bf16_peak_flops(torch.cuda.get_device_name(worker.device))
    if peak is None:
        return {}
    flops = flops_per_token(run.model, data.tokenizer.vocab_size, run.data.max_seq_len)
    return {"speed/mfu": tokens_per_second * flops / (peak * worker.place.world_size)}


def source_counts(run: RunConfig, data: PreparedData, stream: MixedStream, update: int) -> dict[str, float]:
    """Tokens and epochs of each source of a mixture up to an update, by metric key; nothing for a single source."""
    if len(data.sources) == 1:
        return {}
    windows = update * run.windows_per_update
    found: dict[str, float] = {}
    for source, given, epochs in zip(data.sources, stream.mixture.given(windows), stream.epochs(windows), strict=True):
        found |= {f"data/{source.name}/tokens": given * run.data.max_seq_len, f"data/{source.name}/epochs": epochs}
    return found
