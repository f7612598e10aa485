"""What comes over the wire and goes back: requests and answers in the words of OpenAI's completions interface.

A field that is known there and means something that is not done here is refused, rather than passed over.

Source: https://platform.openai.com/docs/api-reference/completions; `top_k`, `min_p` and `repetition_penalty` are vLLM's names.
"""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Problem
from llama_lab.inference.options import read_options

MOST_CHOICES = 32
MOST_STOPS = 16
MOST_TOKENS = 65_536
"""Of a continuation: in a window it would never end by itself."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "beyond_context")
PASSED_OVER = ("user", "best_of", "model", "prompt", "n", "max_tokens", "stream", "stream_options", "stop", "seed", "echo")
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "logprobs": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
}
"""Fields of the interface that are not done here -> the values that ask for nothing."""
FINISHES = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was understood.

    Attributes:
        model: the checkpoint's id; None: the first.
        prompts: every prompt, `n` times each.
        seeds: of their draws.
        options: how they are continued.
        stream: whether pieces are sent as they come.
        usage: whether a stream ends with how many tokens it took.
        echo: whether the prompt stands before its continuation.
    """

    model: str | None
    prompts: list[str | list[int]]
    seeds: list[int]
    options: dict[str, Any]
    stream: bool
    usage: bool
    echo: bool


@dataclass(slots=True)
class Answer:
    """One completion as it goes out."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        """The object of a whole answer, or of a piece."""
        body = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model, "choices": choices}
        return body | ({} if usage is None else {"usage": usage})


def choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    """A continuation, or a piece of it."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None if finish is None else FINISHES[finish]}


def usage_of(sizes: dict[int, tuple[int, int]]) -> dict[str, int]:
    """Tokens of prompts and continuations together, from both by choice."""
    prompt, new = (sum(size[part] for size in sizes.values()) for part in (0, 1))
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def error_body(message: str, *, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """An error as clients expect it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def read_request(content: bytes) -> Asked:
    """Understand a body.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    body = _parsed(content)
    found: list[Problem] = []
    known = {*SAMPLING, *PASSED_OVER, *WITHOUT_EFFECT}
    found += [(name, "is no field of this interface; leave it out") for name in body if name not in known]
    for name, nothing in WITHOUT_EFFECT.items():
        if body.get(name) not in nothing:
            found.append((name, "is not done here; leave it out"))
    model = _typed(body, "model", str, None, found)
    prompts = _prompts(body.get("prompt"), found)
    count = _typed(body, "n", int, 1, found)
    if body.get("best_of") not in (None, count):
        found.append(("best_of", "is not done here; leave it out"))
    if not 1 <= count * max(1, len(prompts)) <= MOST_CHOICES:
        found.append((f"n={count}", f"times the prompts is outside 1 to {MOST_CHOICES} continuations"))
        count = 1
    seed = _typed(body, "seed", int, None, found)
    options = _options(body, found)
    stream = _typed(body, "stream", bool, False, found)
    usage = _typed(body, "stream_options", dict, {}, found).get("include_usage") is True
    echo = _typed(body, "echo", bool, False, found)
    if echo and any(not isinstance(prompt, str) for prompt in prompts):
        found.append(("echo", "needs prompts that are texts"))
    if seed is not None and not 0 <= seed < 2**62:
        found.append((f"seed={seed}", "is outside 0 to 2**62 - 1; try 0"))
    if found:
        raise ConfigError(found, scope="this request")
    first = secrets.randbits(62) if seed is None else seed
    repeated = [prompt for prompt in prompts for _ in range(count)]
    return Asked(model, repeated, [first + number for number in range(len(repeated))], options, stream, usage, echo)


def _parsed(content: bytes) -> dict[str, Any]:
    """A body as JSON has it: numbers are finite, text is Unicode."""
    try:
        body = json.loads(content.decode("utf-8"), parse_constant=_no_number)
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ConfigError([("the body", f"is no JSON: {str(error)[:200]}")], scope="this request") from None
    if not isinstance(body, dict):
        raise ConfigError([("the body", 'is no JSON object; try {"prompt": "The", "max_tokens": 20}')], scope="this request")
    return body


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number there")


def _typed(body: dict[str, Any], name: str, kind: type, default: Any, found: list[Problem]) -> Any:
    """A field's value if it is of its type; absent and null are the default."""
    value = body.get(name)
    if value is None:
        return default
    is_number = kind is float and isinstance(value, int | float) and not isinstance(value, bool)
    if is_number or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}
    found.append((f"{name}={_shown(value)}", f"is not {words[kind]}"))
    return default


def _prompts(given: Any, found: list[Problem]) -> list[str | list[int]]:
    """Prompts in any of the four shapes: a text, texts, ids, lists of ids."""
    several = given if isinstance(given, list) and given and all(isinstance(one, str | list) for one in given) else [given]
    for one in several:
        is_ids = isinstance(one, list) and one and all(isinstance(number, int) and not isinstance(number, bool) for number in one)
        if not isinstance(one, str) and not is_ids:
            found.append((f"prompt={_shown(one)}", "is neither a text nor a list of ids; give one, or several in a list"))
    return several


def _options(body: dict[str, Any], found: list[Problem]) -> dict[str, Any]:
    """How to continue, with this interface's defaults: temperature 1, drawn from all tokens. Without a limit, 100 or what fits."""
    tokens = _typed(body, "max_tokens", int, None, found)
    if tokens is not None and tokens > MOST_TOKENS:
        found.append((f"max_tokens={tokens}", f"is above {MOST_TOKENS}; ask again with what came for more"))
    options: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 1.0, "top_k": None}
    for name in SAMPLING:
        kind = {"top_k": int, "beyond_context": str}.get(name, float)
        if (value := _typed(body, name, kind, None, found)) is not None:
            options[name] = value
    if options["top_k"] in (0, -1):
        options["top_k"] = None
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops) or len(stops) > MOST_STOPS:
        found.append((f"stop={_shown(stop)}", f"is neither a text nor a list of at most {MOST_STOPS} texts"))
    else:
        options["stop"] = tuple(stops)
    try:
        read_options(**options)
    except ConfigError as error:
        found += error.problems
    return options


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
