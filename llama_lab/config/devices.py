"""What this machine computes on, found without importing torch: that would cost seconds before a mistake is answered.

CUDA is asked through the driver's own library, which honours CUDA_VISIBLE_DEVICES as torch does. Whether the installed torch can
use it is read from the files it came with.
"""

import ctypes
import functools
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llama_lab.config.errors import ConfigError

COMPUTE_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the driver's interface."""
BF16_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)
"""First compute capabilities (Ampere, Ada) with bf16 and with float8 in their tensor cores."""
MPS_MACOS = 14
"""First macOS whose Metal torch supports."""
CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True)
class Gpu:
    """What a GPU is sold as.

    Attributes:
        bf16_teraflops: 10^12 multiplications and additions a second in bf16 with sums in fp32, dense.
        gigabytes: of memory; several where one name comes with several.
        has_fp8: whether it computes float8 in hardware.
    """

    bf16_teraflops: float
    gigabytes: tuple[int, ...]
    has_fp8: bool = True


GPUS = {
    "GB200": Gpu(2500, (186,)),
    "B200": Gpu(2250, (180,)),
    "GH200": Gpu(989.4, (96,)),
    "H200 NVL": Gpu(835, (141,)),
    "H200": Gpu(989.4, (141,)),
    "H100 NVL": Gpu(835, (94,)),
    "H100 PCIe": Gpu(756, (80,)),
    "H100": Gpu(989.4, (80,)),
    "A100": Gpu(312, (40, 80), has_fp8=False),
    "A40": Gpu(149.7, (48,), has_fp8=False),
    "A10": Gpu(125, (24,), has_fp8=False),
    "L40S": Gpu(362, (48,)),
    "L40": Gpu(181, (48,)),
    "L4": Gpu(121, (24,)),
    "RTX 6000 Ada": Gpu(364, (48,)),
    "RTX A6000": Gpu(154.8, (48,), has_fp8=False),
    "RTX 5090": Gpu(209.5, (32,)),
    "RTX 4090": Gpu(165.2, (24,)),
    "RTX 3090": Gpu(71, (24,), has_fp8=False),
}
"""By whole words of the device's name; a name that begins with another stands before it. Source: NVIDIA's data sheets; for GeForce
cards the appendices of the architecture white papers."""
NAMED = re.compile(r"(?:(\d+)\s*x\s*)?(?:NVIDIA\s+)?(?:GeForce\s+)?(.+?)(?:[\s-]+(\d+)\s*GB?.*)?", re.IGNORECASE)
USABLE = 0.99
"""Share of so many times 2^30 bytes that the driver offers: 79.2 GiB of an H100's 80, 139.8 of an H200's 141."""
OTHER_CHIPS = re.compile(r"\b(?:Laptop|Mobile|Max-Q|Ti|SUPER|D|MIG)\b")
"""Words after which the same name is another chip, or a slice of one (multi-instance GPU)."""


@dataclass(frozen=True)
class Cuda:
    """What CUDA offers here.

    Attributes:
        devices: visible GPUs that torch can use.
        has_bf16, has_fp8: whether each of them has bf16, float8 in hardware.
        name, bytes: of the first of them, as the driver says it.
        reason: why there are none.
        is_here: whether they are in this machine, or were named for a plan.
    """

    devices: int = 0
    has_bf16: bool = False
    name: str = ""
    bytes: int = 0
    reason: str = ""
    has_fp8: bool = False
    is_here: bool = True


_named: Cuda | None = None


@contextmanager
def in_place_of(gpus: Cuda | None) -> Iterator[None]:
    """Answer with these GPUs, whatever this machine has; None leaves it as it is."""
    global _named
    before, _named = _named, gpus or _named
    try:
        yield
    finally:
        _named = before


def named_gpus(text: str) -> Cuda:
    """GPUs by their number and name, such as `H100`, `8xH100`, `A100 40GB`.

    Raises:
        ConfigError: no such GPU is known, or it comes with different memories.
    """
    found = NAMED.fullmatch(text.strip())
    asked = " ".join(re.split(r"[\s_-]+", found[2].upper())) if found is not None else ""
    # Of these forms there is but one chip; where there are two, both are in the table.
    plain = re.sub(r" (SXM\d?|PCIE)$", "", asked)
    names = {known.upper().removeprefix("RTX "): known for known in GPUS} | {known.upper(): known for known in GPUS}
    name = names.get(asked) or names.get(plain)
    if found is None or name is None or found[1] == "0":
        rule = f"is no GPU that is known here; there are {', '.join(sorted(GPUS))}, also several: 8xH100"
        raise ConfigError([(f"--gpu {text}", rule)], scope="this plan")
    sizes = GPUS[name].gigabytes
    size = int(found[3]) if found[3] else sizes[0]
    if size not in sizes or (len(sizes) > 1 and not found[3]):
        several = f"{found[1]}x" if found[1] else ""
        rule = f"comes with {' or '.join(map(str, sizes))} GB; type --gpu '{several}{name} {sizes[-1]}GB'"
        raise ConfigError([(f"--gpu {text}", rule)], scope="this plan")
    # As the driver calls the one whose speed was measured.
    said = f"NVIDIA {name} {size}GB{' HBM3' if name == 'H100' else ''}"
    memory = int(USABLE * size * 2**30)
    return Cuda(int(found[1] or 1), True, said, memory, has_fp8=GPUS[name].has_fp8, is_here=False)


def probe_cuda() -> Cuda:
    """Visible GPUs, or why there are none."""
    if _named is not None:
        return _named
    if not torch_has_cuda():
        return Cuda(reason="the installed torch is a build without CUDA; install one with it (pytorch.org/get-started)")
    return _driver_devices(os.environ.get("CUDA_VISIBLE_DEVICES"))


def bf16_peak_flops(name: str) -> float | None:
    """What a GPU of this name could compute in bf16 at most, in operations a second; None where that is not known."""
    if OTHER_CHIPS.search(name):
        return None
    return next((gpu.bf16_teraflops * 1e12 for words, gpu in GPUS.items() if re.search(rf"\b{words}\b", name)), None)


def torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    library = "torch_cuda.dll" if sys.platform == "win32" else "libtorch_cuda.so"
    return (Path(spec.origin).parent / "lib" / library).is_file()


def has_mps() -> bool:
    """Whether this is a Mac whose GPU torch can use."""
    if sys.platform != "darwin" or platform.machine() != "arm64":
        return False
    return int(platform.mac_ver()[0].partition(".")[0] or 0) >= MPS_MACOS


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware; without it bf16 is slower than fp32."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not CPU_BF16_FLAGS.isdisjoint(flags.split())


def cpu_name() -> str:
    """The processor as the system calls it; empty if it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    name = next((line for line in text.splitlines() if line.startswith("model name")), "")
    return name.partition(":")[2].strip() or platform.processor()


def usable_cores() -> int:
    """Cores that this process may use, which is also how many threads torch starts on them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _driver_devices(visible: str | None) -> Cuda:
    """Ask the driver once a process; it fixes what is visible at the first call anyway."""
    if visible is not None and visible.strip() in ("", "-1"):
        return Cuda(reason=f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU; unset it")
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Cuda(reason="no NVIDIA driver is installed (its library was not found)")
    count = ctypes.c_int(0)
    if (code := driver.cuInit(0)) != 0 or (code := driver.cuDeviceGetCount(ctypes.byref(count))) != 0:
        return Cuda(reason=f"the NVIDIA driver finds no GPU that it can use (error {code}); see nvidia-smi")
    capabilities = [_capability(driver, ordinal) for ordinal in range(count.value)]
    if not capabilities:
        return Cuda(reason="the NVIDIA driver finds no GPU; see nvidia-smi and CUDA_VISIBLE_DEVICES")
    name, size = _first(driver)
    lowest = min(capabilities)
    return Cuda(len(capabilities), lowest >= BF16_CAPABILITY, name, size, has_fp8=lowest >= FP8_CAPABILITY)


def _capability(driver: ctypes.CDLL, ordinal: int) -> tuple[int, int]:
    """Compute capability of one GPU, major and minor; (0, 0) if the driver does not say."""
    device, parts = ctypes.c_int(0), (ctypes.c_int(0), ctypes.c_int(0))
    failed = driver.cuDeviceGet(ctypes.byref(device), ordinal)
    for part, attribute in zip(parts, COMPUTE_CAPABILITY, strict=True):
        failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
    return (0, 0) if failed else (parts[0].value, parts[1].value)


def _first(driver: ctypes.CDLL) -> tuple[str, int]:
    """Name and memory in bytes of the first GPU; empty and 0 if the driver does not say."""
    device, name, size = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return "", 0
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return name.value.decode(errors="replace"), size.value
