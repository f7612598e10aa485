"""Reading all ids of a bare folder once, to see that a tokenizer has them.

Every byte is read and hashed, by as many threads as there are cores to use, so the first start with a folder takes as long as the
disk or SHA-256 needs for it, whichever is slower. What came out is remembered in the cache folder under path, size and date of each
file.
"""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import numpy as np

from llama_lab.config.devices import usable_cores
from llama_lab.config.errors import ConfigError
from llama_lab.data.cache import Remembered, cache_root, lock_file
from llama_lab.data.corpus import Say
from llama_lab.data.foreign import TokenFile, TokenFolder

MEMORY = "token-files"
READ_BYTES = 2**23
MAX_THREADS = 8
SAY_SECONDS = 10.0


def check_ids(folder: TokenFolder, vocab_size: int, subject: str, say: Say) -> list[str]:
    """See that the vocabulary has every id of a folder. What was read before and has not changed is not read again.

    Args:
        subject: what a problem is reported under.

    Returns:
        SHA-256 of each of `folder.files`.

    Raises:
        ConfigError: an id is beyond the vocabulary, or a file cannot be read.
    """
    try:
        found = _Reading(folder.files, say).run()
    except OSError as error:
        rule = f"cannot be read: {error.strerror or error}"
        raise ConfigError([(f"{subject}: {Path(error.filename or '').name}", rule)], scope="the data") from error
    largest, name = max((largest, file.path.name) for (largest, _), file in zip(found, folder.files, strict=True))
    if largest >= vocab_size:
        rule = f"holds token id {largest} in {name}, but the tokenizer has {vocab_size} entries; name the one they were made with"
        raise ConfigError([(subject, rule)], scope="the data")
    return [digest for _, digest in found]


class _Reading:
    """Largest id and hash of files, found by several threads of one process."""

    def __init__(self, files: tuple[TokenFile, ...], say: Say):
        self._files, self._say = files, say
        self._remembered = Remembered(MEMORY)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._total, self._read = self._unknown(), 0

    def run(self) -> list[tuple[int, str]]:
        """(largest id, SHA-256) of each file."""
        with self._alone() if self._total else contextlib.nullcontext():
            start = time.perf_counter()
            found = self._read_all(start)
        if self._total:
            seconds = time.perf_counter() - start
            self._say(f"Checked {self._read / 1e9:.2f} GB of token ids in {seconds:.1f} s ({self._read / seconds / 1e9:.2f} GB/s)")
        return [(int(largest), str(digest)) for largest, digest in found]

    def _unknown(self) -> int:
        """Bytes of the files that have to be read."""
        return sum(file.bytes for file in self._files if not self._remembered.knows(file.path))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process of a machine read and the others, such as those of a launcher, find what it remembered."""
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # a cache that cannot be written remembers nothing, and nobody need wait for it
                cache_root().mkdir(parents=True, exist_ok=True)
                held.enter_context(lock_file(cache_root() / f"{MEMORY}.lock"))
                self._remembered = Remembered(MEMORY)
                self._total = self._unknown()
            yield

    def _read_all(self, start: float) -> list[list]:
        with ThreadPoolExecutor(min(MAX_THREADS, usable_cores())) as threads:
            tasks = [threads.submit(self._remembered.of, file.path, partial(self._read_one, file)) for file in self._files]
            try:
                waiting = set(tasks)
                while waiting:
                    done, waiting = wait(waiting, timeout=SAY_SECONDS, return_when=FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                    if waiting:
                        self._say(self._progress(time.perf_counter() - start))
                return [task.result() for task in tasks]
            finally:
                # After an error or Ctrl-C nobody waits for a file of many gigabytes to be read to its end.
                self._stop.set()
                threads.shutdown(cancel_futures=True)

    def _progress(self, seconds: float) -> str:
        left = (self._total - self._read) * seconds / max(1, self._read)
        return f"Checked {self._read / 1e9:.1f} of {self._total / 1e9:.1f} GB of token ids; {left:,.0f} s to go, only once"

    def _read_one(self, file: TokenFile, path: Path) -> list:
        digest, largest = hashlib.sha256(), 0
        buffer = np.empty(READ_BYTES, dtype=np.uint8)
        with path.open("rb") as raw:
            digest.update(raw.read(file.offset))
            while size := raw.readinto(buffer.data):
                if self._stop.is_set():
                    raise CancelledError
                digest.update(buffer.data[:size])
                largest = max(largest, int(buffer[:size].view(file.dtype).max()))
                with self._lock:
                    self._read += size
        return [largest, digest.hexdigest()]
