"""Scores: log-likelihoods equal those of one plain pass each, and answers are chosen as lm-evaluation-harness chooses them."""

import pytest
import torch
import torch.distributed as dist

from llama_lab.data.tokenizer import BytesTokenizer, Tokenizer, train_bpe
from llama_lab.inference import score
from llama_lab.inference.score import log_likelihoods, score_task
from llama_lab.inference.tasks import Question, Task
from llama_lab.training.processes.stop import Stopped

from .conftest import WORDS, small_model

QUESTIONS = (
    Question("the model", (" reads", " learns slowly", " a"), 1),
    Question("", ("text", "loss"), 0),
    Question("a token ends with spaces  ", (" never", " again and again"), 1),
    Question("again " * 40, (" and far beyond the context", " x"), 0),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([" ".join(WORDS)] * 3, 320)


@pytest.fixture(scope="module")
def scored(tokenizer):
    return small_model(3, context=40, vocabulary=tokenizer.vocab_size)


def plainly(model, tokenizer, question: Question, text: str) -> float:
    """One pass over the ids of context and continuation, by the rules that are written down."""
    context = question.context.rstrip()
    text = question.context[len(context) :] + text
    if context:
        ids, known = tokenizer.encode(context + text), len(tokenizer.encode(context))
    else:
        ids, known = [tokenizer.eos_id, *tokenizer.encode(text)], 1
    count = len(ids) - known
    ids = ids[-(model.max_seq_len + 1) :]
    count = min(count, len(ids) - 1)
    model.eval()
    with torch.no_grad():
        chances = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0].double(), dim=-1)
    model.train()
    targets = torch.tensor(ids[-count:])
    return float(chances[-count:].gather(1, targets.unsqueeze(1)).sum())


def test_each_continuation_is_as_likely_as_in_a_pass_of_its_own(scored, tokenizer):
    found = log_likelihoods(scored, tokenizer, QUESTIONS)
    assert scored.training
    for question, answers in zip(QUESTIONS, found, strict=True):
        expected = [plainly(scored, tokenizer, question, text) for text in question.continuations]
        assert [answer.log_likelihood for answer in answers] == pytest.approx(expected, rel=1e-5)


def test_the_best_answer_counts_with_and_without_its_length(scored, tokenizer):
    found = log_likelihoods(scored, tokenizer, QUESTIONS)
    plain = norm = 0
    for question, answers in zip(QUESTIONS, found, strict=True):
        values = [answer.log_likelihood for answer in answers]
        by_length = [value / len(text[1:]) for value, text in zip(values, question.continuations, strict=True)]
        plain += values.index(max(values)) == question.gold
        norm += by_length.index(max(by_length)) == question.gold
    whole = score_task(scored, tokenizer, Task("t", True, QUESTIONS))
    assert (whole.questions, whole.correct, whole.correct_norm) == (4, plain, norm)
    assert whole.values() == {"accuracy": plain / 4, "accuracy_norm": norm / 4}
    right = [answers[question.gold].log_likelihood for question, answers in zip(QUESTIONS, found, strict=True)]
    assert whole.nats == pytest.approx(-sum(right) / 4)


def test_the_space_before_a_choice_is_no_part_of_its_length(scored, tokenizer, monkeypatch):
    """By three letters and one, not by four and two."""
    answers = [[score.Likelihood(-3.0, False), score.Likelihood(-6.5, False)]]
    monkeypatch.setattr(score, "log_likelihoods", lambda *arguments, **options: answers)
    found = score_task(scored, tokenizer, Task("t", True, (Question("q", (" a", " abc"), 1),)))
    assert (found.correct, found.correct_norm) == (0, 1)


def test_a_text_is_completed_where_its_first_choice_is_right(scored, tokenizer):
    """The continuation that the model itself would write is found, another is not."""
    context = "the model"
    scored.eval()
    with torch.no_grad():
        best = int(scored(torch.tensor([tokenizer.encode(context)]))[0, -1].argmax())
        worst = int(scored(torch.tensor([tokenizer.encode(context)]))[0, -1].argmin())
    scored.train()

    class Fixed(BytesTokenizer):
        """Ids that are one letter each, so that a continuation is one token."""

        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(context) + [{"+": best, "-": worst}[letter] for letter in text.removeprefix(context)]

    questions = (Question(context, ("+",), 0), Question(context, ("-",), 0), Question(context, ("+",), 0))
    found = score_task(scored, Fixed(), Task("t", False, questions))
    assert found.correct == 2 and found.correct_norm is None
    assert set(found.values()) == {"accuracy", "perplexity"} and found.values()["accuracy"] == pytest.approx(2 / 3)


def test_the_shares_of_the_processes_add_up(scored, tokenizer, tmp_path):
    task = Task("t", True, QUESTIONS)
    whole = score_task(scored, tokenizer, task)
    # A group of this process alone, so that each call returns what its rank would have contributed.
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        shares = [score_task(scored, tokenizer, task, rank=rank, world_size=5) for rank in range(5)]
    finally:
        dist.destroy_process_group()
    assert sum(share.correct for share in shares) == whole.correct
    assert sum(share.nats for share in shares) == pytest.approx(whole.nats)


def test_it_gives_up_when_asked_to_and_leaves_everything_as_it_was(scored, tokenizer):
    state = torch.random.get_rng_state()
    with pytest.raises(Stopped):
        score_task(scored, tokenizer, Task("t", True, QUESTIONS), stopped=lambda: True)
    assert scored.training and torch.equal(torch.random.get_rng_state(), state)
