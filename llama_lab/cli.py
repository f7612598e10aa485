"""The command line: which command, and what its exit code says."""

import difflib
import errno
import os
import shlex
import sys
import time
from io import TextIOWrapper

from llama_lab.arguments import FLAGS, SHORT, UsageError
from llama_lab.commands import COMMANDS, CONFIG, DONE, FAILED
from llama_lab.manual import EXIT_CODES, TRAIN_EXAMPLES

# torchrun looks ten times a second whether a process has failed, and then ends the others; the first may be slower than they are.
FIRST_SECONDS = 10.0
# Characters of a word that was no path.
SHOWN = 40


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the words after the program's name; default: those of this process.
    """
    words = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        # Samples are any text at all; a console with a small code page shows `?` for what it lacks instead of failing the run.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except UsageError as error:
        _leave_to_first(words)
        print(error, file=sys.stderr)
        return CONFIG
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_left():
            raise
        return FAILED
    except Exception as error:
        from llama_lab.config.errors import ConfigError
        from llama_lab.training.errors import RunFailed

        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            # Paths are asked for in many places, and a text in the place of one is a mistake in the request wherever it is noticed.
            shown = repr(str(error.filename)[:SHOWN])
            print(f"{shown}… is too long to name anything; llama-lab {words[0]} --help says what stands where", file=sys.stderr)
            return CONFIG
        if not isinstance(error, ConfigError | RunFailed):
            raise
        if isinstance(error, ConfigError):
            _leave_to_first(words)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return CONFIG if isinstance(error, ConfigError) else FAILED


def _leave_to_first(words: list[str]) -> None:
    """Where torchrun started several processes, leave it to the first of them to say what is wrong with a run, and be ended then.

    Whoever is not ended within a while has a mistake of its own, of its machine say, and goes on to say it.
    """
    if words[:1] == ["train"] and "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0":
        time.sleep(FIRST_SECONDS)


def _reader_left() -> bool:
    """Whether our output goes nowhere any more, as in `llama-lab … | head`; what is left of it is then dropped without a word."""
    if os.name != "posix":
        return False
    import select

    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    # Python flushes once more when it ends, and would complain then.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _dispatch(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name == "help" and words[1:]:
        # Of a command what it says itself; of any other word what it stands for in a config.
        return _dispatch([words[1], "--help"] if words[1] in COMMANDS else ["train", "--help", *words[1:]])
    if name in ("-h", "--help", "help"):
        print(_overview())
        return DONE
    if name in ("-V", "--version"):
        from importlib.metadata import version

        print(f"llama-lab {version('llama_lab')}")
        return DONE
    if name == "__complete":
        from llama_lab.completion import complete

        print("\n".join(complete(" ".join(words[1:]), {command: COMMANDS[command].words for command in COMMANDS})))
        return DONE
    if name not in COMMANDS:
        raise UsageError(_unknown_command(name, words[1:]))
    return COMMANDS[name].run(words[1:])


def _unknown_command(name: str, rest: list[str]) -> str:
    if "=" in name or name in FLAGS["train"] or name in SHORT:
        return f"llama-lab needs a command before {name}; try: {shlex.join(['llama-lab', 'train', name, *rest])}"
    if name.startswith("-"):
        close = difflib.get_close_matches(name, ("--help", "--version"), n=1)
        hint = f"did you mean {close[0]}?" if close else "a command comes first, such as llama-lab train"
        return f"llama-lab has no flag {name}; {hint} (llama-lab --help lists commands)"
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
    return f"llama-lab has no command {name!r}; {hint} (llama-lab --help lists them)"


def _overview() -> str:
    lines = [
        "usage: llama-lab COMMAND [overrides and flags...]",
        "",
        "Train Llama models: composed configs, sweeps, curves.",
        "",
        "Commands:",
    ]
    lines += [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "  --version   print the version", "", "llama-lab train --help lists groups, options and presets."]
    lines += ["", TRAIN_EXAMPLES, "", EXIT_CODES]
    return "\n".join(lines)
