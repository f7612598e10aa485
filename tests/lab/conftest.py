"""The tiny run of the training tests, for what works on runs."""

from ..training.conftest import text, tiny

__all__ = ["text", "tiny"]
