"""A file of rows that survives a full disk: what cannot be written now waits in memory, and is written once there is room."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama_lab.config.disk import remedy, why


class RowFile:
    """A .jsonl file that rows are appended to, whole or not at all.

    Args:
        say: prints a line; called once for as long as rows wait.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._waiting = ""
        self._was_said = False

    def append(self, *rows: dict[str, Any]) -> OSError | None:
        """Append rows, those that wait first. Returns why they have to wait, if they do."""
        self._waiting += "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not self._waiting:
            return None
        try:
            self._write(self._waiting.encode())
        except OSError as error:
            if not self._was_said:
                said = f"{self._path.name} could not be written ({why(error)}). Training goes on; its rows wait in memory"
                self._say(f"{said} until you {remedy(error)}")
            self._was_said = True
            return error
        self._waiting, self._was_said = "", False
        return None

    def _write(self, lines: bytes) -> None:
        size = None
        try:
            with self._path.open("ab") as file:
                size = file.seek(0, os.SEEK_END)
                file.write(lines)
        except OSError:
            if size is not None:
                with suppress(OSError):  # half a row would be taken for a whole one
                    os.truncate(self._path, size)
            raise
