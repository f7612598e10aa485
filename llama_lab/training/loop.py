"""The training loop: what happens in a run, in which order.

Everything that an update does is a function of the config, the update's number and the state before it. So a run that was
stopped and goes on is the run that was never stopped: the position in the data, the learning rate and the seeds of the
samples are computed from the number, and only weights, optimizer states and the open interval of the log are saved.
"""

import torch

from llama_lab.config.schema import Compile, RunConfig
from llama_lab.data.prepare import PreparedData
from llama_lab.data.stream import training_stream
from llama_lab.model.llama import Llama
from llama_lab.training.clock import Clock
from llama_lab.training.compiling import Compiling, import_compiler
from llama_lab.training.console import Console
from llama_lab.training.due import due
from llama_lab.training.feed import Feed
from llama_lab.training.guard import Guard
from llama_lab.training.observing import Observers, observe
from llama_lab.training.optim import Optimizers, build_optimizer
from llama_lab.training.processes.stop import Stop
from llama_lab.training.processes.watchdog import Watchdog
from llama_lab.training.processes.worker import Worker
from llama_lab.training.profiler import Profiler
from llama_lab.training.recording import open_metrics, record, source_counts
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.saving.retention import checkpoint_bytes, checkpoint_due
from llama_lab.training.saving.saver import Saver
from llama_lab.training.state import end_saving, resume, save
from llama_lab.training.stopwatch import Stopwatch
from llama_lab.training.tracking.tracker import Tracker
from llama_lab.training.update import Updater


def train_run(
    run: RunConfig,
    folder: RunFolder,
    data: PreparedData,
    worker: Worker,
    observers: Observers,
    stop: Stop,
    console: Console,
    tracker: Tracker,
    watchdog: Watchdog,
) -> str:
    """Train a run from where it stands to its end, or to a requested stop.

    Args:
        run: resolved: nothing in it is `auto` any more.
        folder: held by this process or its parent.

    Returns:
        "finished" or "preempted", the same on all ranks.

    Raises:
        Diverged: the loss or gradient norm is not finite more often than the run allows; the last checkpoint is from before.
    """
    import_compiler(run)
    model, optimizer = build(run, data, worker)
    stream = training_stream(run, data)
    state = resume(run, folder, model, optimizer, worker, console)
    metrics = open_metrics(run, folder, data, state, console, tracker) if worker.is_main else None
    clock = Clock(state.seconds, worker)
    stopwatch = Stopwatch(worker, is_on=run.log.parts)
    compiling = Compiling(run, data.tokenizer.vocab_size, worker, say=console.say, phase=console.phase)
    profiler = Profiler(run, folder.path, worker, console, clock)
    guard = Guard(run, folder.path, model, worker, console.say, skipped=state.skipped)

    def look() -> bool:
        return observe(run, model, data, observers, worker, metrics, clock, state.update, watchdog, stop)

    def keep() -> None:
        watchdog.at(f"the checkpoint after update {state.update}")
        unless = metrics.flush() if metrics is not None else None
        save(saver, model, optimizer, state, worker, guard, clock, unless=unless)

    with (
        Updater(model, run, worker, stopwatch, compiling) as updater,
        Saver(run, folder, worker.device, console.say) as saver,
        Feed(stream, run, worker, first_update=state.update + 1, last_update=run.updates) as feed,
    ):
        if worker.is_main:
            saver.reserve(checkpoint_bytes(run, data.tokenizer.vocab_size))
        if state.update and not look():
            return "preempted"
        ends = True
        for update in range(state.update + 1, run.updates + 1):
            watchdog.update(update)
            gradients = updater.gradients(feed, update)
            guard.note(update, gradients)
            saver.before_step()
            factor = updater.step(optimizer, update, unless=gradients.is_bad)

            state.count(update, gradients)
            clock.count(run.data.tokens_per_update)
            profiler.update()
            console.progress(update)
            saver.report()
            stops, fed = worker.settle(stop.requested(), gradients.own.hash)
            ends = stops or update == run.updates
            saves = stops or (ends and run.checkpoint.at_end) or checkpoint_due(run, update)
            if metrics is not None:
                metrics.fed(update, fed)
            if update == 1 or due(update, run.log.every_updates) or update == run.updates:
                more = source_counts(run, data, stream, update) | stopwatch.shares()
                record(run, data, state, worker, metrics, guard, clock, factor, gradients.norm, feed.waited, more)
            stopwatch.mark("rest")
            if saves:
                keep()
            if ends and update < run.updates:
                break
            if not look():
                # The next start makes it again, from here.
                ends = False
                if not saves:
                    keep()
                break
            stopwatch.mark(None)
        profiler.close()
        watchdog.at("the last checkpoint")
        end_saving(saver, worker, metrics)
    if metrics is not None and state.update < run.updates:
        metrics.stopped(state.update, state.update * run.data.tokens_per_update)
    return "finished" if ends and state.update == run.updates else "preempted"


def build(run: RunConfig, data: PreparedData, worker: Worker) -> tuple[Llama, Optimizers]:
    """The model with its first weights, and its optimizer, on the worker's device."""
    model = Llama(run.model, vocab_size=data.tokenizer.vocab_size, max_seq_len=run.data.max_seq_len)
    model.initialise(torch.Generator().manual_seed(run.seed.init))
    model.to(worker.device)
    compiles = run.hardware.compile is Compile.always
    return model, build_optimizer(model, run.optim, worker.device.type, run.precision, compiles=compiles)
