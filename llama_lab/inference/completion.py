"""From text to text: prompts become ids, ids become text as soon as it is certain, and stop texts end it."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import index

import torch

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Problem
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.inference.generate import BATCH, Decoder, Finish, Text, continued
from llama_lab.inference.options import NEW_TOKENS, Beyond, Options
from llama_lab.model.llama import Llama

Prompt = str | Sequence[int]
"""A text, taken as the beginning of a document, or ids as the model is to read them."""

REPLACEMENT = "\ufffd"
# A character has at most four bytes, so what has come of an open one lies in at most three tokens.
OPEN_TOKENS = 3
# Ids that are decoded once more with what follows them: some tokenizers drop a space at the start of what they decode.
BEFORE_TOKENS = 4
SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has become certain.

    Attributes:
        index: number of the prompt that it continues.
        text: may be empty in the last piece.
        finish: why the continuation ended, in its last piece; see `Completion`.
        prompt_tokens, new_tokens: ids of the prompt, the token before a document counted, and drawn so far.
    """

    index: int
    text: str
    finish: Finish | None
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt's continuation.

    Attributes:
        text: without the prompt, and without the text that stopped it.
        finish: `eos` where the model ended the document, `stop` where a stop text came, `length` where it has all the tokens that
            it may have.
        prompt_tokens, new_tokens: ids of the prompt, the token before a document counted, and drawn.
    """

    text: str
    finish: Finish
    prompt_tokens: int
    new_tokens: int


class Reader:
    """Ids that come one by one, as text that will not change any more.

    Held back are bytes that may be the beginning of a character, and letters that may be the beginning of a stop text.

    Args:
        before: ids of the prompt; only what follows them is given.
        stop: texts of which the first that is complete ends it.

    Attributes:
        stopped: whether one of them came.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        # They have no text, and may stand between the bytes of a character.
        self._silent = frozenset(tokenizer.special_ids.values())
        self._ids = list(before[-BEFORE_TOKENS:])
        self._given = len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        """Text that is certain now."""
        self._ids += [id for id in ids if id not in self._silent]
        return self._passed_on(self._taken(self._certain()), is_last=False)

    def rest(self) -> str:
        """What was held back, after the last id."""
        return self._passed_on(self._taken(len(self._ids)), is_last=True)

    def _certain(self) -> int:
        """How many of the ids make whole characters."""
        whole, count = self._tokenizer.decode(self._ids), len(self._ids)
        if not whole.endswith(REPLACEMENT):
            return count
        for end in range(count - 1, max(self._given, count - OPEN_TOKENS) - 1, -1):
            # Bytes that stand for nothing by themselves show that a character goes on across this place.
            if self._tokenizer.decode(self._ids[:end]) + self._tokenizer.decode(self._ids[end:]) == whole:
                return end
        return count

    def _taken(self, end: int) -> str:
        """Text of the ids up to `end` that was not taken yet."""
        before = self._tokenizer.decode(self._ids[: self._given])
        text = self._tokenizer.decode(self._ids[:end])[len(before) :]
        start = max(0, end - BEFORE_TOKENS)
        self._ids, self._given = self._ids[start:], end - start
        return text

    def _passed_on(self, text: str, *, is_last: bool) -> str:
        """What is no part of a stop text."""
        if self.stopped:
            return ""
        held = self._held + text
        places = [held.index(stop) for stop in self._stop if stop in held]
        if places:
            self.stopped, self._held = True, ""
            return held[: min(places)]
        sizes = range(min(len(held), max(map(len, self._stop), default=1) - 1), 0, -1)
        kept = next((size for size in sizes if not is_last and any(stop.startswith(held[-size:]) for stop in self._stop)), 0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: Options,
    *,
    seeds: Sequence[int] | None = None,
    batch: int = BATCH,
    decoder: Decoder | None = None,
) -> Generator[Piece, None, None]:
    """Continue prompts side by side. Pieces come as soon as they are certain; each prompt's last one says why it ended.

    Args:
        seeds: of each prompt's draws; None: counted up from `options.seed`, for equal draws would make texts alike.
        batch: prompts that are continued at once at most.
        decoder: of this model, used again.

    Raises:
        ConfigError: prompts that cannot be continued, all at once.
    """
    ids, limits = _read(model, tokenizer, prompts, options)
    if seeds is not None and len(seeds) != len(ids):
        raise ConfigError([(f"{len(seeds)} seeds", f"are not one for each of {len(ids)} prompts")], scope="this request")
    seeds = range(options.seed, options.seed + len(ids)) if seeds is None else seeds
    texts = [
        Text(one, limit, options, torch.Generator().manual_seed(seed)) for one, limit, seed in zip(ids, limits, seeds, strict=True)
    ]
    readers = [Reader(tokenizer, one, options.stop) for one in ids]
    padding = range(tokenizer.vocab_size, model.vocab_size)
    batch = max(1, min(batch, len(texts)))
    tokens = continued(model, texts, eos_id=tokenizer.eos_id, forbidden_ids=padding, batch=batch, decoder=decoder)
    # Not there but here, so that a mistake is raised by the call and not by the first piece.
    return _pieces(texts, tokens, readers)


def _pieces(texts: Sequence[Text], tokens: Generator[Text, None, None], readers: Sequence[Reader]) -> Generator[Piece, None, None]:
    numbers, sizes = {id(text): number for number, text in enumerate(texts)}, [len(text.ids) for text in texts]
    with closing(tokens):
        for text in tokens:
            number = numbers[id(text)]
            reader = readers[number]
            said = reader.add(text.new[-1:]) if text.finish != "eos" else ""
            if reader.stopped:
                text.finish = "stop"
            if text.finish is not None:
                said += reader.rest()
            if said or text.finish is not None:
                yield Piece(number, said, text.finish, sizes[number], len(text.new))


def _read(model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt], options: Options) -> tuple[list[list[int]], list[int]]:
    """Ids of each prompt, and how many may follow them."""
    found: list[Problem] = []
    ids, limits = [], []
    for prompt in prompts:
        try:
            one = [tokenizer.start_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else list(map(index, prompt))
        except TypeError:
            found.append((f"the prompt {_shown(prompt)}", "is neither a text nor a list of ids; give one, or several in a list"))
            continue
        problem = _problem(model, prompt, one, options)
        if problem is not None:
            found.append((f"the prompt {_shown(prompt)}", problem))
        ids.append(one)
        room = model.max_seq_len - len(one)
        asked = options.max_new_tokens or NEW_TOKENS
        limits.append(min(asked, room) if options.beyond_context is Beyond.refuse else asked)
    if found:
        raise ConfigError(found, scope="this request")
    return ids, limits


def _problem(model: Llama, prompt: Prompt, ids: list[int], options: Options) -> str | None:
    """What is wrong with a prompt."""
    if not ids or (isinstance(prompt, str) and not prompt):
        return "is empty; give it a first word, such as The"
    if not 0 <= min(ids) <= max(ids) < model.vocab_size:
        wrong = next(id for id in ids if not 0 <= id < model.vocab_size)
        return f"has the id {wrong}, which is outside the vocabulary; ids are 0 to {model.vocab_size - 1}"
    room = model.max_seq_len - len(ids)
    if options.beyond_context is Beyond.window or room >= (options.max_new_tokens or 1):
        return None
    size = f"has {len(ids)} tokens, and the model was trained with a context of {model.max_seq_len}"
    works = "beyond_context=window reads on in a window"
    if room < 1:
        return f"{size}, which leaves no room for new ones; shorten it, or {works}"
    return f"{size}, which leaves room for {room} new ones, not {options.max_new_tokens}; max_new_tokens={room} fits, or {works}"


def _shown(prompt: Prompt) -> str:
    text = repr(prompt)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…{text[-1]}"
