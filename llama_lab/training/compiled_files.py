"""Where compilers keep their files while a run lasts: in the cache folder, and not where they are gone after a restart."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llama_lab.config.schema import Compile, HardwareConfig
from llama_lab.data.cache import compiled_root

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variable that says where a compiler keeps its files -> folder below the cache's own."""
SHAPES = 128
"""How often one function may be compiled: Muon's step once for each shape of matrix. torch's own 8 are fewer than a model has whose
layers differ in width."""


@contextmanager
def keeping_compiled(hardware: HardwareConfig) -> Iterator[None]:
    """While the context lasts, compilers keep their files in the cache, unless the variables say otherwise, and may meet as many
    shapes as a model has; then all is as before.

    It is entered before the compiler is imported: at the first call of torch.compile torch chooses a folder of its own, writes it
    into the environment, and keeps to it.

    Args:
        hardware: resolved.
    """
    if hardware.compile is not Compile.always:
        yield
        return
    before = {name: os.environ.get(name) for name in VARIABLES}
    for name, folder in VARIABLES.items():
        if before[name] is None or _is_torchs_choice(before[name] or ""):
            os.environ[name] = str(compiled_root() / folder)
    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            yield
    finally:
        # How often one function may be compiled is counted for the process: after models of other shapes the next would fail.
        torch._dynamo.reset()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _is_torchs_choice(folder: str) -> bool:
    """Whether torch, and no user, put a folder into the environment: something was compiled in this process before."""
    module = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    return module is not None and folder.startswith(module.default_cache_dir())
