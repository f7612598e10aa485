"""How often in a run something happens beside its updates; `loop` says when. Torch-free."""

from dataclasses import dataclass

from llama_lab.config.schema import RunConfig, SampleConfig
from llama_lab.training.saving.retention import need


@dataclass(frozen=True, slots=True)
class Occasions:
    """Counts over a whole run, and whether it ends with a save, which it waits for."""

    updates: int
    validations: int
    scores: int
    samples: int
    saves: int
    ends_saved: bool


def occasions(run: RunConfig, vocab_size: int) -> Occasions:
    """The counts of a run, from its config."""
    updates, node = run.updates, run.eval
    return Occasions(
        updates=updates,
        validations=0 if node is None else _and_at_end(updates, node.every_updates),
        scores=0 if node is None or not node.tasks else _and_at_end(updates, node.tasks_every_updates),
        samples=0 if run.sample is None else len(_sampled(run.sample, run)),
        saves=need(run, vocab_size).written - (0 if run.checkpoint.at_end else 1),
        ends_saved=run.checkpoint.at_end,
    )


def _and_at_end(updates: int, every: int | None) -> int:
    """Multiples of `every` among the updates, and the last one."""
    return 1 if every is None else -(-updates // every)


def _sampled(node: SampleConfig, run: RunConfig) -> set[int]:
    """The updates that samples follow: those that reach `first_tokens`, then intervals that grow, and the last."""
    size, updates = run.data.tokens_per_update, run.updates
    if node.growth == 1 and node.first_tokens <= size:
        return set(range(1, updates + 1))
    found, interval = {updates}, float(node.first_tokens)
    reached = interval
    while reached <= updates * size:
        found.add(int(-(-reached // size)))
        interval *= node.growth
        reached += interval
    return found
