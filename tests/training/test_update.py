"""One update by itself: what is left to chance in it, and what it leaves behind in the model."""

from dataclasses import replace

import pytest
import torch

from llama_lab.config.resolve import resolve
from llama_lab.config.schema import Recompute, RunConfig
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.data.stream import training_stream
from llama_lab.training.feed import Feed
from llama_lab.training.loop import build
from llama_lab.training.processes.worker import Place, Worker
from llama_lab.training.update import Updater

ALONE = Worker(Place(), torch.device("cpu"))


@pytest.fixture
def dropping(tiny) -> tuple[RunConfig, PreparedData]:
    run = resolve(tiny("model.dropout=0.2", "model.zero_init_outputs=false"))
    return run, prepare(run.data, run.tokenizer, lambda text: None)


def loss_of(run: RunConfig, data: PreparedData, *, rank: int, update: int) -> float:
    """Summed loss of the run's first windows, as if they were those of an update on a rank."""
    worker = Worker(Place(rank), torch.device("cpu"))
    model, _ = build(run, data, worker)
    feeding = Feed(training_stream(run, data), run, ALONE, first_update=1, last_update=1)
    with Updater(model, run, worker) as updater, feeding as feed:
        return float(updater.gradients(feed, update).own.loss_sum)


def test_dropout_is_drawn_anew_by_every_rank_in_every_update_and_repeats(dropping):
    run, data = dropping
    torch.manual_seed(1)
    found = {(rank, update): loss_of(run, data, rank=rank, update=update) for rank in (0, 1) for update in (1, 2)}
    assert len(set(found.values())) == 4
    torch.manual_seed(2)
    assert {place: loss_of(run, data, rank=place[0], update=place[1]) for place in reversed(found)} == found


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_what_is_computed_twice_is_so_for_as_long_as_updates_are_made(dropping, recompute):
    """And the masks of dropout are the same both times."""
    run, data = dropping
    plain, _ = build(run, data, ALONE)
    saving, _ = build(run, data, ALONE)
    changed = replace(run, hardware=replace(run.hardware, recompute=recompute))
    for model, own in ((plain, run), (saving, changed)):
        feeding = Feed(training_stream(run, data), own, ALONE, first_update=1, last_update=1)
        with Updater(model, own, ALONE) as updater, feeding as feed:
            updater.gradients(feed, 1)
    for expected, found in zip(plain.parameters(), saving.parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None
        assert torch.equal(expected.grad, found.grad)
    tokens = torch.zeros(1, 8, dtype=torch.int64)

    def kept(model: torch.nn.Module) -> int:
        """Tensors that a forward keeps for its backward."""
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, tokens)
        return count

    assert kept(saving) == kept(plain)
    saving.set_recompute(recompute)
    assert kept(saving) < kept(plain)
