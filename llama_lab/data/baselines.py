"""What needs no training says about a validation text, in bits per byte: the numbers that a model has to beat."""

import gzip
import lzma
import math

import numpy as np

MAX_BYTES = 8_000_000
"""Of text that is worth compressing: xz takes a second a megabyte, and more text moves the result little."""


def compression_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits a byte that gzip and xz need for a text at their best settings."""
    packed = {"gzip": gzip.compress(text, compresslevel=9), "xz": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    return {f"{name}_bits_per_byte": 8 * len(found) / len(text) for name, found in packed.items()}


def unigram_bits_per_byte(train_counts: np.ndarray, val_counts: np.ndarray, text_bytes: int) -> float:
    """Bits a byte of a model that knows only how frequent each token is in training.

    Args:
        train_counts, val_counts: occurrences of each id among the predicted tokens, (vocab_size,). One is added to the former, so
            that no token is impossible.
        text_bytes: UTF-8 bytes of the validation text.
    """
    smoothed = train_counts + 1.0
    nats = -(val_counts * np.log(smoothed / smoothed.sum())).sum()
    return float(nats) / math.log(2) / text_bytes
