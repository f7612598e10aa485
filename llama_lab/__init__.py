"""llama_lab: a research suite for pretraining LLaMA-style models, configured with Hydra.

from llama_lab import compose, load, train

result = train(compose(["experiment=smoke"]))
print(load(result.folder).generate("Return the", max_new_tokens=20))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_lab.api import ConfigError, compose, load, train

__all__ = ["ConfigError", "compose", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `llama-lab --help` and TAB need neither Hydra nor torch."""
    if name in __all__:
        from llama_lab import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What TAB and `help` show, imported or not yet."""
    return sorted({*globals(), *__all__})
