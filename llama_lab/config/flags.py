"""Flags of the commands that take no overrides."""

import argparse
import difflib
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, which also says what a mistyped flag was meant to be."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with code 2."""
        prefix = "unrecognized arguments: "
        words = message.removeprefix(prefix).split() if message.startswith(prefix) else []
        unknown = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
        if unknown is None:
            super().error(message)
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        close = difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
        self.exit(2, f"{self.prog} has no flag {unknown}; {hint}\n")
