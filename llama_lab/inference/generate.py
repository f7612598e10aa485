"""Continuing prompts: one token after the other, with a cache of keys and values. Tokens in, tokens out; text is the caller's."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from itertools import islice

import torch
from torch import Tensor

from llama_lab.model.cache import KVCache
from llama_lab.model.llama import Llama
from llama_lab.training.stop import Stopped


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    top_k: int | None = None,
    eos_id: int | None = None,
    forbidden_ids: Sequence[int] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Continue each prompt, one at a time; see `continuation` for the arguments they share.

    Args:
        new_tokens: most tokens that a prompt gets.
        stopped: asked after each token whether to give up.

    Returns:
        The new tokens of each prompt, without the prompt and without `eos_id`.

    Raises:
        Stopped: it was to give up.
    """
    outputs: list[list[int]] = []
    for prompt in prompts:
        tokens = continuation(
            model, prompt, temperature=temperature, generator=generator, top_k=top_k, eos_id=eos_id, forbidden_ids=forbidden_ids
        )
        with contextlib.closing(tokens):
            outputs.append([])
            for token in islice(tokens, new_tokens):
                outputs[-1].append(token)
                if stopped():
                    raise Stopped
    return outputs


def continuation(
    model: Llama,
    prompt: Sequence[int],
    *,
    temperature: float,
    generator: torch.Generator,
    top_k: int | None = None,
    eos_id: int | None = None,
    forbidden_ids: Sequence[int] = (),
) -> Generator[int, None, None]:
    """Tokens that follow a prompt, each computed when it is asked for, without end unless `eos_id` is drawn.

    Each token costs one position's work. Once the context is full it starts anew with its last half, so a text may be longer than
    the model's context; of a prompt that is longer, only the end is read. The global random state is left alone, and the model
    is in evaluation mode until the iterator is closed. Under `torch.autocast` on a CPU every token would convert all weights
    again: leave it off there.

    Args:
        model: on any device; drawing happens on the CPU, so equal logits give equal tokens everywhere.
        prompt: token ids, at least one. Training documents follow an end-of-document token, so a prompt that is meant as the
            beginning of a document should too.
        temperature: divides the logits, at least 0; at 0 the most likely token is taken and `generator` is not used.
        generator: a CPU generator that the draws come from.
        top_k: draw among so many most likely tokens only; None: among all.
        eos_id: the token that ends the text; it is not part of it.
        forbidden_ids: tokens that are never drawn, such as padding.

    Raises:
        ValueError: the prompt is empty, an id is outside the vocabulary, or an option is out of its range.
    """
    if not prompt:
        raise ValueError("an empty prompt cannot be continued; begin with the end-of-document token")
    if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
        raise ValueError(f"prompt ids {min(prompt)} to {max(prompt)} are not all in a vocabulary of {model.vocab_size}")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is below 0; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} is below 1; null draws among all tokens")
    return _continuation(model, list(prompt), temperature, generator, top_k, eos_id, list(forbidden_ids))


def _continuation(
    model: Llama,
    text: list[int],
    temperature: float,
    generator: torch.Generator,
    top_k: int | None,
    eos_id: int | None,
    forbidden: list[int],
) -> Generator[int, None, None]:
    """`continuation` after its arguments were checked; `text` grows by what is drawn, and is cut when the context is full."""
    device = model.embedding.weight.device
    cache = KVCache(model.config, batch=1, max_len=model.max_seq_len, dtype=model.activation_dtype(), device=device)
    was_training = model.training
    model.eval()
    try:
        text = text[-model.max_seq_len :]
        unread = text
        while True:
            if cache.length + len(unread) > model.max_seq_len:
                text = text[-max(1, model.max_seq_len // 2) :]
                unread, cache.length = text, 0
            logits = _next_logits(model, torch.tensor([unread], device=device), cache)
            logits[forbidden] = -torch.inf
            token = draw(logits, temperature, top_k, generator)
            if token == eos_id:
                return
            yield token
            unread = [token]
            text.append(token)
    finally:
        model.train(was_training)


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token id, drawn from softmax(logits / temperature) over the `top_k` largest; the largest itself at temperature 0.

    Args:
        logits: (vocabulary,), float32, on the CPU.
    """
    if temperature == 0:
        return int(logits.argmax())
    ids = None
    if top_k is not None and top_k < len(logits):
        logits, ids = logits.topk(top_k)
    drawn = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
    return int(drawn if ids is None else ids[drawn])


@torch.no_grad()
def _next_logits(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor:
    """Logits of the token after `tokens`, (vocabulary,), float32, on the CPU.

    `forward` is called by name, past a compiled call: every length would compile anew.
    """
    return model.forward(tokens, cache=cache)[0, -1].float().cpu()
