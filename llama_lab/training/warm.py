"""What training imports at some time, all at once: for a process that jobs are forked from, which then need not import it again.

Nothing here may start a thread or touch a GPU, since neither survives a fork.
"""

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo  # the first optimizer of a process imports it, which takes longer than torch itself

import llama_lab.training.announce
import llama_lab.training.loop
import llama_lab.training.plots
import llama_lab.training.processes.worker  # noqa: F401


def use_threads(count: int) -> None:
    """Use so many threads of the CPU from here on. To be called before the first computation: threads that were started stay."""
    torch.set_num_threads(count)
