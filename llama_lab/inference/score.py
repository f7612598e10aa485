"""Scoring a model on tasks: how likely each possible answer is after its question, as lm-evaluation-harness counts it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llama_lab.data.tokenizer import Tokenizer
from llama_lab.inference.tasks import Question, Task
from llama_lab.model.llama import Llama
from llama_lab.training.processes.stop import Stopped

LOGITS_AT_ONCE = 1 << 25
"""Numbers in the logits of a batch: 128 MB in float32."""
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How a model takes a continuation.

    Attributes:
        log_likelihood: of all of its tokens together, in nats.
        is_greedy: whether each of them is the model's first choice.
    """

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Score:
    """What a task came to.

    Attributes:
        name: of the task.
        questions: how many there are.
        correct: for how many of them the right choice is the most likely one, or the model's own continuation is the right one.
        correct_norm: the same by log-likelihood over the number of characters of a choice, which does not favour short ones; None
            where nothing is chosen.
        nats: of the right continuation, the mean over questions.
    """

    name: str
    questions: int
    correct: int
    correct_norm: int | None
    nats: float

    def values(self) -> dict[str, float]:
        """The figures by name: accuracies, and for continuations the perplexity, of the continuation as a whole."""
        found = {"accuracy": self.correct / self.questions}
        if self.correct_norm is not None:
            return found | {"accuracy_norm": self.correct_norm / self.questions}
        return found | {"perplexity": math.exp(self.nats) if self.nats < 700 else math.inf}


def score_task(
    model: Llama,
    tokenizer: Tokenizer,
    task: Task,
    *,
    rank: int = 0,
    world_size: int = 1,
    stopped: Callable[[], bool] = lambda: False,
) -> Score:
    """Answer a task's questions. Processes take them in turn; precision is the caller's, as for `evaluate`.

    No random state is touched, and the model is put back to the mode it was in.

    Args:
        stopped: asked before each batch whether to give up.

    Returns:
        The same on all ranks.

    Raises:
        Stopped: on all ranks, if any of them gave up.
    """
    own = task.questions[rank::world_size]
    found = log_likelihoods(model, tokenizer, own, stopped=stopped)
    gave_up = found is None
    correct = correct_norm = 0
    nats = 0.0
    for question, answers in zip(own, found or [], strict=not gave_up):
        correct += _best([answer.log_likelihood for answer in answers]) == question.gold if task.is_choice else answers[0].is_greedy
        # The space before a choice is not counted; one without a letter is never the best.
        sizes = [len(text) - 1 for text in question.continuations]
        by_length = [answer.log_likelihood / size if size else -math.inf for answer, size in zip(answers, sizes, strict=True)]
        correct_norm += _best(by_length) == question.gold
        nats -= answers[question.gold].log_likelihood
    device = model.embedding.weight.device
    sums = torch.tensor([correct, correct_norm, nats, gave_up], dtype=torch.float32 if device.type == "mps" else torch.float64)
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    correct, correct_norm, nats, giving_up = sums.tolist()
    if giving_up:
        raise Stopped
    count = len(task.questions)
    return Score(task.name, count, round(correct), round(correct_norm) if task.is_choice else None, nats / count)


@torch.no_grad()
def log_likelihoods(
    model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], *, stopped: Callable[[], bool] = lambda: False
) -> list[list[Likelihood]] | None:
    """How likely each continuation of each question is; None if it was to give up."""
    requests = [_encoded(tokenizer, question.context, text) for question in questions for text in question.continuations]
    found: list[Likelihood | None] = [None] * len(requests)
    # Of like lengths together, the longest first: little padding, and too large a batch fails at once.
    order = sorted(range(len(requests)), key=lambda number: -len(requests[number][0]))
    was_training = model.training
    model.eval()
    try:
        start = 0
        while start < len(order):
            if stopped():
                return None
            longest = min(len(requests[order[start]][0]) - 1, model.max_seq_len)
            count = sequences_at_once(longest, model.vocab_size)
            chosen = order[start : start + count]
            for number, answer in zip(chosen, _scored(model, [requests[number] for number in chosen]), strict=True):
                found[number] = answer
            start += count
    finally:
        model.train(was_training)
    answers = iter(found)
    return [[answer for _ in question.continuations if (answer := next(answers)) is not None] for question in questions]


def sequences_at_once(length: int, vocab_size: int) -> int:
    """How many sequences of so many tokens are predicted in one batch: 1 at least, and no more than memory is sure to hold."""
    return max(1, min(TOKENS_AT_ONCE // length, LOGITS_AT_ONCE // (length * vocab_size)))


def _encoded(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """(ids of both, how many of them are the continuation's). Spaces at the context's end count as the continuation's.

    They are encoded together, because that is what the model has read; its tokens may join the two differently at other places.
    """
    spaces = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
    if not context:
        ids = tokenizer.encode(continuation)
        return [tokenizer.start_id, *ids], len(ids)
    ids = tokenizer.encode(context + continuation)
    return ids, len(ids) - len(tokenizer.encode(context))


def _scored(model: Llama, requests: list[tuple[list[int], int]]) -> list[Likelihood]:
    """The continuations of some requests in one pass. What is too long for the context loses its beginning."""
    windows = [ids[-(model.max_seq_len + 1) :] for ids, _ in requests]
    longest = max(map(len, windows)) - 1
    tokens = torch.zeros((len(windows), longest), dtype=torch.int64)
    for row, window in enumerate(windows):
        tokens[row, : len(window) - 1] = torch.tensor(window[:-1])
    logits = model.forward(tokens.to(model.embedding.weight.device))
    found = []
    for row, (window, (_, count)) in enumerate(zip(windows, requests, strict=True)):
        end = len(window) - 1
        count = min(count, end)
        targets = torch.tensor(window[end + 1 - count :], device=logits.device)
        chosen = torch.log_softmax(logits[row, end - count : end].float(), dim=-1)
        total = chosen.gather(1, targets.unsqueeze(1)).sum(dtype=torch.float32 if logits.device.type == "mps" else torch.float64)
        found.append(Likelihood(float(total), bool((chosen.argmax(dim=-1) == targets).all())))
    return found


def _best(values: Sequence[float]) -> int:
    """Place of the largest, the first of several."""
    return max(range(len(values)), key=values.__getitem__)
