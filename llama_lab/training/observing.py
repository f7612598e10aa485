"""Looking at the model while it trains: validation, tasks and samples, none of which training depends on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama_lab.config.schema import RunConfig, SampleConfig
from llama_lab.data.prepare import PreparedData
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.model.llama import Llama
from llama_lab.training.clock import Clock
from llama_lab.training.due import samples_due, scores_due, validation_due
from llama_lab.training.metrics import Metrics, Sample
from llama_lab.training.processes.stop import Stop, Stopped
from llama_lab.training.processes.watchdog import Watchdog
from llama_lab.training.processes.worker import Worker


@dataclass(frozen=True, slots=True)
class Observers:
    """What the loop calls to look at the model, handed in by a package above this one.

    Each is given a function last, which it calls between two steps of its work and which says whether a stop was asked for. It then
    raises `Stopped`; `evaluate` does so on all ranks if any rank has to.

    Attributes:
        evaluate: (model, data, run, worker, stopped) -> an object with `loss_nats`, `bits_per_byte` (infinite if bytes are unknown)
            and `sources`, such an object by name for each source of a mixture.
        score: (model, tokenizer, run, worker, stopped) -> for each task of the run, by its name, values by name. On all ranks.
        sample: (model, data, node, seed, stopped) -> a sample for each prompt of the node, and for one drawn from its sets.
    """

    evaluate: Callable[[Llama, PreparedData, RunConfig, Worker, Callable[[], bool]], Any]
    score: Callable[[Llama, Tokenizer, RunConfig, Worker, Callable[[], bool]], dict[str, dict[str, float]]]
    sample: Callable[[Llama, PreparedData, SampleConfig, int, Callable[[], bool]], list[Sample]]


def observe(
    run: RunConfig,
    model: Llama,
    data: PreparedData,
    observers: Observers,
    worker: Worker,
    metrics: Metrics | None,
    clock: Clock,
    update: int,
    watchdog: Watchdog,
    stop: Stop,
) -> bool:
    """Validate and sample where they are due after `update`. Neither changes anything that training depends on.

    Returns:
        Whether nothing is left to do. False on all ranks alike: a stop was asked for in between, and what it cut short left no row.
    """

    def stopped() -> bool:
        watchdog.alive()
        return stop.requested()

    validates = validation_due(run.eval, update, run.updates) and data.val_tokens > 0
    samples = run.sample is not None and samples_due(run.sample, run, update)
    scores = scores_due(run.eval, update, run.updates)
    if not validates and not samples and not scores:
        # And the device is not waited for: the host prepares the next update while it computes this one.
        return True
    with clock.excluded():
        if validates:
            watchdog.at(f"the validation after update {update}")
            try:
                result = observers.evaluate(model, data, run, worker, stopped)
            except Stopped:
                return False
            if metrics is not None:
                loss, bits, sources = parts_of(result)
                metrics.validation(axes(run, update, clock), loss=loss, bits_per_byte=bits, sources=sources)
        if scores:
            watchdog.at(f"the tasks after update {update}")
            try:
                found = observers.score(model, data.tokenizer, run, worker, stopped)
            except Stopped:
                return False
            if metrics is not None:
                metrics.scores(axes(run, update, clock), found)
        if run.sample is None or not samples:
            return True
        watchdog.at(f"the samples after update {update}")
        cut_short = False
        if metrics is not None:
            seed = run.seed.sampling + update
            try:
                texts = observers.sample(model, data, run.sample, seed, stopped)
                metrics.samples(axes(run, update, clock), texts, seed=seed)
            except Stopped:
                cut_short = True
        return not worker.agree(cut_short)


def parts_of(result: Any) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """Loss and bits per byte of what `Observers.evaluate` gives, and both of each source by its name."""
    own = {name: (part.loss_nats, part.bits_per_byte) for name, part in result.sources.items()}
    return result.loss_nats, result.bits_per_byte, own


def axes(run: RunConfig, update: int, clock: Clock) -> dict[str, Any]:
    """The three x-axes of a row."""
    return {"update": update, "tokens": update * run.data.tokens_per_update, "seconds": round(clock.seconds(), 3)}
