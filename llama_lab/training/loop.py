"""The training loop: what happens in a run, in which order.

Everything that an update does is a function of the config, the update's number and the state before it. So a run that was
stopped and goes on is the run that was never stopped: the position in the data, the learning rate and the seeds of the
samples are computed from the number, and only weights, optimizer states and the open interval of the log are saved.
"""

import torch

from llama_lab.config.disk import remedy, why
from llama_lab.config.schema import Compile, RunConfig
from llama_lab.data.prepare import PreparedData
from llama_lab.data.stream import training_stream
from llama_lab.model.llama import Llama
from llama_lab.training.choice import damaged, told
from llama_lab.training.clock import Clock
from llama_lab.training.compiling import Compiling, import_compiler
from llama_lab.training.console import Console
from llama_lab.training.due import due
from llama_lab.training.errors import Diverged, SaveFailed
from llama_lab.training.feed import Feed
from llama_lab.training.guard import Guard
from llama_lab.training.manifest import DamagedCheckpoint, list_checkpoints, list_incomplete, remove_drafts, set_aside
from llama_lab.training.metrics import Metrics, cut_back
from llama_lab.training.observing import Observers, observe
from llama_lab.training.optim import Optimizers, build_optimizer
from llama_lab.training.profiler import Profiler
from llama_lab.training.recording import record, source_counts
from llama_lab.training.retention import checkpoint_bytes, checkpoint_due
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.saver import Saver
from llama_lab.training.state import State
from llama_lab.training.stop import Stop
from llama_lab.training.stopwatch import Stopwatch
from llama_lab.training.tracker import Tracker
from llama_lab.training.update import Updater
from llama_lab.training.watchdog import Watchdog
from llama_lab.training.worker import Worker


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
    metrics = None
    if worker.is_main:
        start_tokens = state.update * run.data.tokens_per_update
        metrics = Metrics(
            folder,
            console,
            tracker,
            vocab_size=data.tokenizer.vocab_size,
            total_tokens=run.updates * run.data.tokens_per_update,
            start_tokens=start_tokens,
        )
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


def resume(run: RunConfig, folder: RunFolder, model: Llama, optimizer: Optimizers, worker: Worker, console: Console) -> State:
    """Put weights and optimizer back to the newest whole checkpoint, and the rows of the run with them."""
    if worker.is_main:
        remove_drafts(folder.checkpoints)
    state, begun = State.at_start(worker), None
    broken = list_incomplete(folder.checkpoints)
    for checkpoint in reversed(list_checkpoints(folder.checkpoints)):
        try:
            state.restore(checkpoint, model, optimizer, worker)
        except DamagedCheckpoint as error:
            broken.append(error)
            continue
        begun = checkpoint
        break
    broken.sort(key=lambda error: error.path)
    if broken and begun is None:
        raise damaged(folder, broken[-1], scope="continuing this run")
    if worker.agree(state.update != 0) and not worker.agree_on(state.update):
        raise RuntimeError(
            f"rank {worker.place.rank} finds update {state.update}, others another: is the run folder on a shared disk?"
        )
    if worker.is_main:
        with folder.writing():
            set_aside(folder.checkpoints, after=state.update)
            cut_back(folder.path, state.update)
    for error in broken:
        console.say(f"{told(error)}; its checkpoint is put aside as damaged-{error.path.parent.name}", style="yellow")
    if begun is not None:
        console.say(f"Continuing after update {begun.update} of {run.updates} ({begun.path.name})")
    return state


def save(
    saver: Saver,
    model: Llama,
    optimizer: Optimizers,
    state: State,
    worker: Worker,
    guard: Guard,
    clock: Clock,
    *,
    unless: OSError | None = None,
) -> None:
    """Begin to write a checkpoint from rank 0, with the open log interval of all ranks added up."""
    with clock.excluded():
        guard.look()
        loss_sum, predicted = worker.total(torch.stack((state.loss_sum, state.predicted))).unbind()
        # Weights are equal on all ranks, so all of them come to the same conclusion. One answer, so that the device is asked once.
        finite = torch.stack([loss_sum.isfinite(), *(parameter.isfinite().all() for parameter in model.parameters())])
        if not bool(finite.all()):
            raise Diverged(f"at update {state.update} the loss or a weight is no finite number; the checkpoint before it stays")
        if not worker.is_main:
            state.loss_sum.zero_()
            state.predicted.zero_()
            return
        state.loss_sum.copy_(loss_sum)
        state.predicted.copy_(predicted)
        rest = {"optimizer": optimizer.state_dict(), "seconds": clock.seconds(), "loss_sum": loss_sum, "predicted": predicted}
        rest["skipped"] = guard.skipped
        saver.save(state.update, model, rest, unless=unless)


def end_saving(saver: Saver, worker: Worker, metrics: Metrics | None) -> None:
    """Wait for the last checkpoint. All ranks fail alike if it or a row could not be written: the run is not done before it is
    saved."""
    failure = saver.close()
    if failure is None and metrics is not None and (error := metrics.flush()) is not None:
        failure = f"rows of the run could not be written ({why(error)}); {remedy(error)} and type the same command again, which "
        failure += "makes them again"
    if (failure := worker.heard(failure)) is not None:
        raise SaveFailed(failure)
