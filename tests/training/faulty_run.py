"""A training run with a real fault in one of its processes: python faulty_run.py FAULT CALL LAST RANK overrides...

The fault comes after validation number CALL of this start and goes before number LAST (0: it stays), in process RANK. With a
validation after every update, updates CALL + 1 to LAST of a new run have it. A continued run begins with a validation.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llama_lab.config.compose import compose
from llama_lab.inference.observers import OBSERVERS
from llama_lab.training.errors import RunFailed
from llama_lab.training.launch import launch
from llama_lab.training.observing import Observers


def plant(fault: str, model: Any) -> Callable[[], None]:
    """Break something; returns what repairs it."""
    embedding = next(model.parameters())
    match fault:
        case "gradient":
            return list(model.parameters())[2].register_hook(lambda gradient: gradient * math.nan).remove
        case "loss":
            return model.register_forward_hook(lambda module, inputs, loss: loss + math.inf).remove
        case "jump":
            return model.register_forward_hook(lambda module, inputs, loss: loss + 20_000.0).remove
        case "weight":
            before = embedding[32].clone()
            embedding[32] = math.inf
            return lambda: embedding.__setitem__(32, before)
    raise ValueError(fault)


def faulty_observers() -> Observers:
    """Those of any run, and the fault."""
    fault, (call, last, rank) = sys.argv[1], (int(word) for word in sys.argv[2:5])
    calls, repairs = 0, []

    def validate(model: Any, data: Any, run: Any, worker: Any, stopped: Any) -> Any:
        nonlocal calls
        import torch

        calls += 1
        if calls == last:
            while repairs:
                repairs.pop()()
        found = OBSERVERS.evaluate(model, data, run, worker, stopped)
        if calls == call and worker.place.rank == rank:
            with torch.no_grad():
                repairs.append(plant(fault, model))
        return found

    return replace(OBSERVERS, evaluate=validate)


if __name__ == "__main__":
    try:
        launch(compose(sys.argv[5:]), faulty_observers)
    except RunFailed as error:
        sys.exit(f"{type(error).__name__}: {error}")
