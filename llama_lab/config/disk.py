"""What to say where a place cannot be written, and small files that are replaced in one step."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_lab.config.errors import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT)
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR)
REMEDIES = {
    **dict.fromkeys(FULL, "make room on that disk"),
    # Room helps nothing here: `ulimit -f`, a batch system or the file system itself allows no larger file.
    errno.EFBIG: "lift the limit on the size of a file (ulimit -f shows it)",
    **dict.fromkeys(IN_THE_WAY, "move the file that is in its place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable"),
}


def why(error: OSError) -> str:
    """The system's reason, without its number and the path."""
    return error.strerror or str(error)


def remedy(error: OSError, otherwise: str = "make it possible to write there") -> str:
    """What helps against an error, as the beginning of a sentence's rest."""
    return REMEDIES.get(error.errno or 0, otherwise)


@contextmanager
def writing(subject: str, otherwise: str, *, scope: str = "this run", goes_on: bool = True) -> Iterator[None]:
    """Turn a place that cannot be written into a ConfigError.

    Args:
        subject: what is written.
        otherwise: what else to do about it.
        goes_on: whether the same command goes on from what is written already.
    """
    try:
        yield
    except BrokenPipeError:  # of what is said, not of what is written
        raise
    except OSError as error:
        first = ""
        if error.errno in IN_THE_WAY:
            first = f"{remedy(error)}, or "
        elif error.errno in (*FULL, errno.EFBIG):
            again = "type the same command again" + (", which goes on from there" if goes_on else "")
            first = f"{remedy(error)} and {again}, or "
        raise ConfigError([(subject, f"cannot be written: {why(error)}; {first}{otherwise}")], scope=scope) from error


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a small file in one step, so that a reader never sees half of it, and a full disk leaves what was there.

    Args:
        durable: whether that holds for a power cut as well, which costs a wait of milliseconds for the disk.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            if durable:
                # Else the new name may reach the disk before what it names.
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
