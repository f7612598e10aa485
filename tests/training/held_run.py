"""`llama-lab …` that waits at a place of its run: python held_run.py PLACE GATE words...

Every process of the run notes its arrival in a file `GATE.PROCESS` and waits there, alive to its watchdog, until it is asked to
stop or GATE exists. So a test does to a run what it has to at that very place, however fast or slow the machine is at the moment.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from llama_lab.cli import main
from llama_lab.training.processes.stop import Stop
from llama_lab.training.processes.watchdog import Watchdog

# Read at import: the processes that a run spawns import this file again, with the same arguments.
PLACE, GATE = sys.argv[1], Path(sys.argv[2])
STOPS: list[Stop] = []
say_place, make_stop = Watchdog.at, Stop.__init__


def at(watchdog: Watchdog, place: str) -> None:
    """What the loop calls wherever it goes."""
    say_place(watchdog, place)
    if place == PLACE and not GATE.exists():
        GATE.with_name(f"{GATE.name}.{os.getpid()}").touch()
        while not GATE.exists() and not any(stop.requested() for stop in STOPS):
            watchdog.alive()
            time.sleep(0.01)


def init(stop: Stop, *arguments: Any, **options: Any) -> None:
    """Every stop of this process is known."""
    make_stop(stop, *arguments, **options)
    STOPS.append(stop)


Watchdog.at, Stop.__init__ = at, init

if __name__ == "__main__":
    sys.exit(main(sys.argv[3:]))
