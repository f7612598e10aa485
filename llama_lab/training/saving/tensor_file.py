"""Named tensors as a safetensors file, written and checksummed in one pass.

The library's own writer reports a full disk as an error of its own kind, and `torch.save` as a wrong position. This one hands the
tensors' memory to the system as it is: other threads run meanwhile, the checksum costs no second reading, and what fails is an
`OSError` that says why.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK_BYTES = 1 << 24


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors by name, and wait until they have reached the disk.

    Args:
        path: a file that is made or overwritten.
        tensors: on the CPU, of any shape.
        metadata: texts that the file says of itself.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        OSError: the disk is full or cannot be written.
        TypeError: a tensor's dtype has no name in the format.

    Source: the format's description in the safetensors repository: the header's length in 8 bytes, little-endian; the header, JSON
    padded with spaces to a multiple of 8; the tensors, row by row, without gaps.
    """
    # The widest dtype first, so that each tensor starts at a multiple of its own width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}, which safetensors has no name for")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in (len(text).to_bytes(8, "little") + text, *(_memory(tensor) for _, tensor in ordered)):
            rest = memoryview(part)
            while len(rest):
                written = file.write(rest[:CHUNK_BYTES])
                digest.update(rest[:written])
                rest = rest[written:]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _memory(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
