"""`llama-lab generate`: texts continued by a trained run: one as it is written, several side by side, or in a conversation."""

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.schema import Problem
from llama_lab.inference.options import NEW_TOKENS, Beyond, Options, read_options
from llama_lab.lab.patterns import RUN_HELP
from llama_lab.training.run_folder import find_run, named_run, no_run
from llama_lab.training.saving.choice import chosen_checkpoint

if TYPE_CHECKING:
    from llama_lab.inference.load import LoadedRun

SCOPE = "this request"
NAMES = [field.name for field in fields(Options) if field.name != "stop"]
FINISHES = {"eos": "the model ended the document", "stop": "a stop text came", "length": "it has all its tokens"}
INTERACTIVE_HELP = """\
  Type a text and press Enter to have it continued; Enter alone continues the last one.
  /temperature 0.5   sets an option; so do /top_k, /top_p, /min_p, /repetition_penalty, /max_new_tokens, /seed
  /options           shows them        /help   shows this        /quit or Ctrl-D ends        Ctrl-C stops a text"""


def run_generate_command(words: list[str]) -> int:
    """Continue what was typed.

    Args:
        words: what follows `generate` on the command line.

    Returns:
        The exit code: 0 done, 2 not understood.

    Raises:
        ConfigError: there is no such run, or prompts or options are not as they must be.
    """
    try:
        asked = _parser().parse_intermixed_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    options = _options(asked)
    prompts = _prompts(asked)
    if not prompts and not asked.interactive:
        raise ConfigError(_nothing_to_continue(asked.run), scope=SCOPE)
    if asked.interactive and (prompts or asked.json):
        raise ConfigError([("--interactive", "asks for its prompts itself, and prints no JSON; leave the others out")], scope=SCOPE)
    run = open_checkpoint(asked.run, asked.update, device=asked.device, precision=asked.precision)
    try:
        _continue(run, prompts, options, asked)
    except ConfigError as error:
        raise ConfigError([(subject, _with_flags(rule)) for subject, rule in error.problems], scope=SCOPE) from None
    return 0


def _continue(run: "LoadedRun", prompts: list[str], options: Options, asked: argparse.Namespace) -> None:
    """Continue the prompts in the way that was asked for."""
    if asked.interactive:
        _converse(run, options)
    elif asked.json or len(prompts) * asked.samples > 1:
        _print_all(run, prompts, options, samples=asked.samples, batch=asked.batch, as_json=asked.json)
    else:
        _stream(run, prompts[0], options)


def open_checkpoint(folder: Path, update: str | None, *, device: str, precision: str) -> "LoadedRun":
    """The checkpoint that was typed, on a device.

    Args:
        update: as typed: a number, `last` or `best`; None: last.

    Raises:
        ConfigError: there is none, or no such device.
    """
    found = find_run(folder)
    number = chosen_checkpoint(found, update, scope=SCOPE).update

    from llama_lab.inference.load import load_run

    try:
        return load_run(found.path, number, device=device, precision="bf16" if precision == "bf16" else "fp32")
    except ConfigError as error:
        raise ConfigError([(subject, _with_flags(rule)) for subject, rule in error.problems], scope=SCOPE) from None


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What tells which weights are meant, and where they compute."""
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--update", metavar="N", help="the checkpoint after update N, or last, or best by validation (default: last)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, mps, or auto for the best there is (default)")
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16"), help="dtype of weights and activations (default: fp32)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab generate",
        description="Continue texts with a trained run. One text appears as it is written; several are continued side by side.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "prompts", nargs="*", metavar="TEXT", help="what to continue, as the beginning of a document; - is the input"
    )
    parser.add_argument(
        "--prompts", dest="file", metavar="FILE", help="a prompt a line: .txt, or .jsonl with the key `prompt`; - is the input"
    )
    parser.add_argument("-i", "--interactive", action="store_true", help="ask for texts, one after the other")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"tokens added at most (default: {NEW_TOKENS}, or what fits)"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="divides the logits; 0 takes the likeliest (default: 0.8)")
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens (default: 50; 0: among all)")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw among the likeliest that reach probability X together")
    parser.add_argument("--min-p", type=float, metavar="X", help="draw among those with at least X of the likeliest's probability")
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1: tokens that came already become less likely"
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end where TEXT would begin; may be given several times")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default: 0); a second text has the next, and so on")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of each prompt (default: 1)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="texts continued at once at most (default: 16)")
    beyond = "a text longer than the context: refuse it (default), or read on in a window"
    parser.add_argument("--beyond-context", choices=list(Beyond.__members__), help=beyond)
    parser.add_argument("--json", action="store_true", help="print a JSON object a text")
    return parser


def _options(asked: argparse.Namespace) -> Options:
    """Options as typed, said of as flags where they are wrong."""
    given: dict[str, Any] = {name: getattr(asked, name) for name in NAMES if getattr(asked, name, None) is not None}
    found = []
    if asked.greedy:
        if asked.temperature:
            found.append((f"--temperature {asked.temperature}", "contradicts --greedy; leave one of them out"))
        given["temperature"] = 0.0
    if given.get("top_k") == 0:
        given["top_k"] = None
    for prompt in asked.prompts:
        name, equals, value = prompt.partition("=")
        if equals and name in NAMES:
            found.append((prompt, f"would be a text to continue; the option is --{name.replace('_', '-')} {value}"))
    for name in ("samples", "batch"):
        if getattr(asked, name) < 1:
            found.append((f"--{name} {getattr(asked, name)}", "is below 1; try 1"))
    options = Options()
    try:
        options = read_options(**given, stop=asked.stop)
    except ConfigError as error:
        found += [(_as_flag(subject), rule) for subject, rule in error.problems]
    if found:
        raise ConfigError(found, scope=SCOPE)
    return options


def _as_flag(subject: str) -> str:
    name, _, value = subject.partition("=")
    return f"--{name.replace('_', '-')} {value}"


def _with_flags(rule: str) -> str:
    """A rule that speaks of options as Python has them, as the command line has them."""
    for name in (*NAMES, "update"):
        rule = rule.replace(f"{name}=", f"--{name.replace('_', '-')} ")
    return rule


def _prompts(asked: argparse.Namespace) -> list[str]:
    """All prompts that were typed, in files, or come in through a pipe."""
    found = [sys.stdin.read() if prompt == "-" else prompt for prompt in asked.prompts]
    if asked.file is None:
        return found
    path, problems = Path(asked.file).expanduser(), []
    try:
        lines = (sys.stdin.read() if asked.file == "-" else path.read_text(encoding="utf-8-sig")).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError([(f"--prompts {asked.file}", f"cannot be read: {why}")], scope=SCOPE) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt: Any = line
        if path.suffix == ".jsonl":
            with contextlib.suppress(ValueError, TypeError, LookupError):
                prompt = json.loads(line)["prompt"]
            if not isinstance(prompt, str) or prompt is line:
                problems.append((f"{path}:{number}", "is no JSON object with a text as `prompt`"))
        found.append(prompt)
    if not problems and not lines[0] and len(lines) == 1:
        problems.append((f"--prompts {asked.file}", "is empty; it holds a prompt a line"))
    if problems:
        raise ConfigError(problems, scope=SCOPE)
    return found


def _nothing_to_continue(typed: Path) -> list[Problem]:
    """What is wrong where one word alone was typed: a run without a text, or a text without a run."""
    missing = ("no prompt", "was typed; add a text in quotes, --prompts FILE, or --interactive")
    path = named_run(typed)
    if os.path.exists(path):  # noqa: PTH110 - a text that is no path at all is answered, not an error
        return [missing]
    near = no_run(path)
    if "did you mean" in near:
        return [(str(typed), near), missing]
    return [(repr(str(typed)), f"is no run, and RUN is missing: llama-lab generate RUN {shlex.quote(str(typed))}")]


def _stream(run: "LoadedRun", prompt: str, options: Options, show_prompt: bool = True) -> str:
    """Print one text as it is written. Returns the continuation."""
    text, first, last = "", None, None
    with contextlib.closing(run.stream(prompt, **asdict(options))) as pieces:
        if show_prompt:
            _write(_bold(prompt))
        try:
            for last in pieces:
                first = first or (time.perf_counter(), last.new_tokens)
                text += last.text
                _write(_safe(last.text))
        except KeyboardInterrupt:
            _write(" …")
    _write("\n")
    if first is not None and last is not None and sys.stderr.isatty():
        # Without the first token, which reads the prompt.
        rate = (last.new_tokens - first[1]) / max(1e-9, time.perf_counter() - first[0])
        speed = f", {rate:.0f} a second" if last.new_tokens > first[1] else ""
        why = "stopped" if last.finish is None else FINISHES[last.finish]
        print(f"[{last.new_tokens} tokens{speed}; {why}]", file=sys.stderr)
    return text


def _print_all(run: "LoadedRun", prompts: list[str], options: Options, *, samples: int, batch: int, as_json: bool) -> None:
    """Print several texts in their order, each as soon as those before it are there."""
    asked = [prompt for prompt in prompts for _ in range(samples)]
    texts, ended, shown = [""] * len(asked), {}, 0
    with contextlib.closing(run.stream(asked, batch=batch, **asdict(options))) as pieces:
        for piece in pieces:
            texts[piece.index] += piece.text
            if piece.finish is not None:
                ended[piece.index] = piece
            while shown in ended:
                done = ended[shown]
                if as_json:
                    row = {"prompt": asked[shown], "text": texts[shown], "finish": done.finish, "seed": options.seed + shown}
                    row |= {"prompt_tokens": done.prompt_tokens, "new_tokens": done.new_tokens, "update": run.update}
                    print(json.dumps(row, ensure_ascii=False), flush=True)
                else:
                    print(f"{_bold(asked[shown])}{_safe(texts[shown])}\n{'' if shown + 1 == len(asked) else '---'}", flush=True)
                shown += 1


def _converse(run: "LoadedRun", options: Options) -> None:
    """Continue what is typed, until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then has a history and keys to edit with
    if options.beyond_context is Beyond.refuse and options.max_new_tokens is None:
        # A conversation grows; refusing its next line would end it.
        options = read_options(**asdict(options) | {"beyond_context": Beyond.window})
    print(f"{run.update} updates, a context of {run.model.max_seq_len} tokens.\n{INTERACTIVE_HELP}")
    text = ""
    while True:
        try:
            line = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            options = _changed(options, line)
            continue
        text = line or text
        if not text:
            print("Type a text first; /help says more")
            continue
        try:
            text += _stream(run, text, options, show_prompt=bool(line))
        except ConfigError as error:
            _complain(error)


def _changed(options: Options, line: str) -> Options:
    """Options after a line that begins with a slash."""
    name, _, value = line[1:].strip().partition(" ")
    known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "seed")
    if name == "options":
        print("  " + ", ".join(f"{key} {getattr(options, key)}" for key in known))
    elif name in known and value.strip():
        kind: Callable[[str], float] = int if name in ("top_k", "max_new_tokens", "seed") else float
        try:
            typed = None if value.strip() in ("none", "null") else kind(value)
            options = read_options(**asdict(options) | {name: typed})
            print(f"  {name} is {typed}")
        except ValueError as error:
            _complain(error) if isinstance(error, ConfigError) else print(f"  {value.strip()} is no number; try /{name} 1")
    elif name != "help":
        print(f"  /{name} is no command, or lacks its value")
        print(INTERACTIVE_HELP)
    else:
        print(INTERACTIVE_HELP)
    return options


def _complain(error: ConfigError) -> None:
    for subject, rule in error.problems:
        print(f"  {subject} {rule}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _bold(text: str) -> str:
    """What was typed, told from what was written, on a terminal that shows it."""
    return f"\033[1m{_safe(text)}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def _safe(text: str) -> str:
    """Text for a terminal, which would obey control characters; a file gets it as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "·" for letter in text)
