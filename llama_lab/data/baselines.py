"""What needs no training says about a validation text, in bits per byte: the numbers that a model has to beat."""

import gzip
import math
import subprocess
import sys

import numpy as np

MAX_BYTES = 8_000_000
"""Of text that is worth compressing: xz takes a second a megabyte, and more text moves the result little."""

# xz takes some 140 MiB for that much. In a process of its own they come and go, and add nothing to what encoding holds.
XZ = "import lzma, sys; print(len(lzma.compress(sys.stdin.buffer.read(), preset=9 | lzma.PRESET_EXTREME)))"


def compression_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits a byte that gzip and xz need for a text at their best settings."""
    xz_bytes = int(subprocess.run([sys.executable, "-I", "-S", "-c", XZ], input=text, stdout=subprocess.PIPE, check=True).stdout)
    sizes = {"gzip": len(gzip.compress(text, compresslevel=9)), "xz": xz_bytes}
    return {f"{name}_bits_per_byte": 8 * size / len(text) for name, size in sizes.items()}


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
