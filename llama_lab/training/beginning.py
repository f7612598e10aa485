"""The state before the first update of a run whose weights come from elsewhere, as a checkpoint that training goes on from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_lab.config.identity import to_yaml
from llama_lab.config.schema import RunConfig
from llama_lab.model.llama import Llama
from llama_lab.training.optim import build_optimizer
from llama_lab.training.processes.worker import Place, Worker
from llama_lab.training.saving.checkpoint import save_checkpoint
from llama_lab.training.saving.manifest import Checkpoint
from llama_lab.training.state import State


def save_beginning(
    folder: Path, weights: dict[str, Tensor], run: RunConfig, *, vocab_size: int, facts: dict[str, Any]
) -> Checkpoint:
    """Write the checkpoint of update 0: the weights, and an optimizer that has seen nothing.

    Args:
        folder: where the run's checkpoints lie.
        weights: by our names, on the CPU, in float32.
        run: resolved.
        facts: what the manifest says of the origin.

    Raises:
        OSError: the disk is full or not writable.
    """
    model = Llama(run.model, vocab_size=vocab_size, max_seq_len=run.data.max_seq_len)
    model.load_state_dict(weights, assign=True)
    optimizer = build_optimizer(model, run.optim, "cpu", run.precision)
    start = State.at_start(Worker(Place(), torch.device("cpu")))
    state = {"optimizer": optimizer.state_dict(), "seconds": 0.0, "loss_sum": start.loss_sum, "predicted": start.predicted}
    state["skipped"] = 0
    return save_checkpoint(
        folder, update=0, tokens=0, model=weights, state=state, facts={"windows": 0, **facts}, config=to_yaml(run)
    )
