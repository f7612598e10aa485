"""Continuing texts: one token after the other, with a cache of keys and values. Ids in, ids out; what they say is `completion`'s.

Several texts grow together: each is read by itself into a row of the cache, and then all of them take a token at a step. A text
that ends makes room for the next. What a text becomes does not depend on the others, but for the rounding of their logits.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llama_lab.inference.options import Sampling
from llama_lab.inference.plain_step import PlainStep
from llama_lab.inference.recorded import RecordedStep
from llama_lab.inference.sampling import draw
from llama_lab.model.cache import KVCache, Step
from llama_lab.model.llama import Llama
from llama_lab.training.processes.stop import Stopped

Finish = Literal["eos", "length", "stop"]
"""Why a text ended: the model ended it, it has all the tokens it may have, or whoever reads it has seen enough."""

BATCH = 16
"""Texts that grow together if nothing else is asked for."""


@dataclass(slots=True)
class Text:
    """A text that is continued.

    Attributes:
        ids: the prompt, at least one id, followed by what was drawn; in a window, what is left of both. Documents of training
            follow an end-of-document token, so a prompt that is meant as the beginning of one should too.
        new_tokens: most tokens that are drawn.
        generator: a CPU generator that the draws come from.
        new: what was drawn, without the token that ends the text.
        finish: why it ended; None as long as it grows. A reader may set it to `stop`.
    """

    ids: list[int]
    new_tokens: int
    sampling: Sampling
    generator: torch.Generator
    new: list[int] = field(default_factory=list)
    finish: Finish | None = None
    logits: Tensor | None = field(default=None, repr=False)
    """Of the next token, (vocabulary,), float32, on the CPU; None until they are computed."""


class Decoder:
    """The rows of a cache, and the texts that grow in them. It may be used again when its texts have ended.

    Args:
        model: on any device, in evaluation mode. `forward` is called by name, past a compiled call, which would compile anew.
        rows: texts that grow together at most.
        tuned: whether steps are made fast, which takes a little time before the first of them: on a GPU they are recorded as CUDA
            graphs, which also take memory, and on a CPU the weights are laid out anew, in place.
    """

    def __init__(self, model: Llama, rows: int, *, tuned: bool = False):
        self.model, self.rows = model, rows
        self.texts: list[Text] = []
        self._device = model.embedding.weight.device
        self._cache = KVCache(
            model.config, batch=rows, max_len=model.max_seq_len, dtype=model.activation_dtype(), device=self._device, only_last=True
        )
        self._lengths = [0] * rows
        self._recorded = RecordedStep(model, self._cache) if tuned and self._device.type == "cuda" else None
        self._plain = PlainStep(model, self._cache.row(0, 0)) if tuned and PlainStep.suits(model) else None

    def add(self, text: Text) -> None:
        """Read a text into a free row. Of one that is longer than the context only the end is read."""
        self.texts.append(text)
        self._read(len(self.texts) - 1, self.model.max_seq_len)

    def drop(self) -> None:
        """Free the rows of texts that have ended."""
        for row in reversed(range(len(self.texts))):
            if self.texts[row].finish is not None:
                last = self.texts.pop()
                if row < len(self.texts):
                    self._cache.move(len(self.texts), row)
                    self.texts[row], self._lengths[row] = last, self._lengths[len(self.texts)]

    @torch.no_grad()
    def step(self, eos_id: int | None, forbidden: list[int]) -> None:
        """Let each text take a token, or end."""
        self._compute()
        for text in self.texts:
            assert text.logits is not None
            if forbidden:
                text.logits[forbidden] = -torch.inf
            seen = [id for id in text.ids if id != eos_id] if text.sampling.repetition_penalty is not None else ()
            token = draw(text.logits, text.sampling, text.generator, seen)
            text.logits = None
            if token == eos_id:
                text.finish = "eos"
                continue
            text.ids.append(token)
            text.new.append(token)
            if len(text.new) >= text.new_tokens:
                text.finish = "length"

    def _compute(self) -> None:
        """Find the logits of the texts that have none yet."""
        for row, text in enumerate(self.texts):
            if text.logits is None and self._lengths[row] >= self.model.max_seq_len:
                # The context is full: its last half becomes the beginning.
                self._read(row, max(1, self.model.max_seq_len // 2))
        waiting = [row for row, text in enumerate(self.texts) if text.logits is None]
        if not waiting:
            return
        # A row whose logits are there takes part all the same, since rows lie side by side. Where its step is written its own next
        # one will be, or, where it is full, nothing will be looked at before it is read again.
        tokens = [text.ids[-1] for text in self.texts]
        lengths = [min(length, self.model.max_seq_len - 1) for length in self._lengths[: len(tokens)]]
        for row, logits in zip(waiting, self._next_logits(tokens, lengths)[waiting], strict=True):
            self.texts[row].logits = logits
            self._lengths[row] += 1

    def _next_logits(self, tokens: list[int], lengths: list[int]) -> Tensor:
        """Logits after one more token of each text, (texts, vocabulary), float32, on the CPU."""
        if self._recorded is not None:
            return self._recorded(tokens, lengths)
        is_alone = len(tokens) == 1
        if is_alone and self._plain is not None:
            return self._plain(tokens[0], lengths[0])
        shaped = torch.tensor(tokens, device=self._device).unsqueeze(1)
        if is_alone:
            # One text needs no mask, and reads no position that it has not got.
            cache = self._cache.row(0, lengths[0])
        else:
            cache = Step(self._cache, torch.tensor(lengths, device=self._device), max(lengths) + 1)
        return self.model.forward(shaped, cache=cache)[:, -1].float().cpu()

    @torch.no_grad()
    def _read(self, row: int, longest: int) -> None:
        """Begin a row with the end of its text."""
        text = self.texts[row]
        text.ids = text.ids[-longest:]
        self._lengths[row] = len(text.ids)
        tokens = torch.tensor([text.ids], device=self._device)
        text.logits = self.model.forward(tokens, cache=self._cache.row(row, 0))[0, -1].float().cpu()


def continued(
    model: Llama,
    texts: Iterable[Text],
    *,
    eos_id: int | None = None,
    forbidden_ids: Sequence[int] = (),
    batch: int = BATCH,
    decoder: Decoder | None = None,
) -> Generator[Text, None, None]:
    """Continue texts, each of them given after every token and when it ends.

    Once the context is full a text goes on with its last half, so it may become longer than the model's context. The global random
    state is left alone, and the model is in evaluation mode until the iterator is closed. Under `torch.autocast` on a CPU every
    token would convert all weights again: leave it off there.

    Args:
        model: on any device; drawing happens on the CPU.
        texts: taken as there is room for them.
        eos_id: the token that ends a text.
        forbidden_ids: tokens that are never drawn, such as padding.
        batch: texts that grow together at most; a decoder brings its own number.
        decoder: of this model, used again.

    Raises:
        ValueError: a prompt is empty, or an id is outside the vocabulary.
    """
    decoder = decoder or Decoder(model, batch)
    was_training, waiting, forbidden = model.training, iter(texts), list(forbidden_ids)
    model.eval()
    try:
        while True:
            decoder.drop()
            while len(decoder.texts) < decoder.rows and (text := next(waiting, None)) is not None:
                check_ids(model, text.ids)
                decoder.add(text)
            if not decoder.texts:
                return
            decoder.step(eos_id, forbidden)
            yield from decoder.texts
    finally:
        decoder.texts.clear()
        model.train(was_training)


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
    eos_id: int | None = None,
    forbidden_ids: Sequence[int] = (),
    batch: int = BATCH,
    stopped: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Continue prompts; see `continued` for the arguments they share.

    Args:
        new_tokens: most tokens that a prompt gets.
        seeds: of the draws for each prompt, which gets what it would get alone; None: 0, 1, …
        stopped: asked after each token whether to give up.

    Returns:
        The new tokens of each prompt, without the prompt and without `eos_id`.

    Raises:
        Stopped: it was to give up.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))]
    texts = [Text(list(prompt), new_tokens, sampling, draws) for prompt, draws in zip(prompts, generators, strict=True)]
    tokens = continued(model, texts, eos_id=eos_id, forbidden_ids=forbidden_ids, batch=min(batch, max(1, len(texts))))
    try:
        for _ in tokens:
            if stopped():
                raise Stopped
    finally:
        tokens.close()
    return [text.new for text in texts]


def check_ids(model: Llama, ids: Sequence[int]) -> None:
    """Raise ValueError where a model cannot read them."""
    if not ids:
        raise ValueError("an empty prompt cannot be continued; begin with the end-of-document token")
    if not 0 <= min(ids) <= max(ids) < model.vocab_size:
        raise ValueError(f"ids {min(ids)} to {max(ids)} are not all in a vocabulary of {model.vocab_size}")
