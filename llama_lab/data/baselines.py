"""What needs no training says about a validation text, in bits per byte: the numbers that a model has to beat."""

import gzip
import lzma
import math
from collections.abc import Iterable

import numpy as np

# xz takes a second a megabyte, and more text moves the result little.
MAX_BYTES = 8_000_000


def compression_bits_per_byte(texts: Iterable[str]) -> dict[str, float]:
    """Bits a byte that gzip and xz need at their best settings for texts joined by a blank line.

    Args:
        texts: documents; those beyond 8 MB are left out.
    """
    kept: list[bytes] = []
    size = 0
    for text in texts:
        kept.append(text.encode())
        size += len(kept[-1])
        if size >= MAX_BYTES:
            break
    joined = b"\n\n".join(kept)[:MAX_BYTES]
    packed = {"gzip": gzip.compress(joined, compresslevel=9), "xz": lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)}
    return {f"{name}_bits_per_byte": 8 * len(found) / len(joined) for name, found in packed.items()}


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
