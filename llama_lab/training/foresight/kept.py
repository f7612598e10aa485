"""Facts that were measured once and are kept in the cache folder for the next time. Torch-free."""

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama_lab.data.cache import cache_root


def kept(name: str) -> dict[str, Any]:
    """What is kept under a name; nothing where there is none, or where it cannot be read."""
    with suppress(OSError, ValueError):
        known = json.loads(_file(name).read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    return {}


def keep(name: str, known: dict[str, Any]) -> None:
    """Keep it for the next time. Whoever writes last wins; what another process loses by that is found again."""
    file = _file(name)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
        os.replace(draft, file)


def _file(name: str) -> Path:
    return cache_root() / f"{name}.json"
