"""Choosing a token: what is left to draw from is what transformers leaves, and draws follow the probabilities."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_lab.config.errors import ConfigError
from llama_lab.inference.options import Beyond, Sampling, read_options
from llama_lab.inference.sampling import draw, kept, penalised

SEEN = [3, 3, 17, 40]


def theirs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities of transformers' own chain of processors."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty is not None:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return torch.softmax(chain(torch.tensor([SEEN]), logits.unsqueeze(0).clone())[0], dim=-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_k=None),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_k=None, top_p=0.6),
        Sampling(temperature=1.0, top_k=None, min_p=0.1),
        Sampling(temperature=0.9, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
        Sampling(temperature=1.0, top_k=None, top_p=1e-6),
        Sampling(temperature=1.0, top_k=999, top_p=1.0, min_p=1.0),
    ],
)
def test_what_is_left_is_what_transformers_leaves(sampling):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(60, generator=generator) * 3
        ours = logits if sampling.repetition_penalty is None else penalised(logits, sampling.repetition_penalty, SEEN)
        weights, ids = kept(ours, sampling)
        found = torch.zeros(60).scatter(0, torch.tensor(ids), torch.tensor(weights / weights.sum(), dtype=torch.float32))
        torch.testing.assert_close(found, theirs(logits, sampling), atol=1e-6, rtol=1e-5)


def test_what_reaches_the_probability_asked_for_is_enough():
    """Weights that are added up exactly: two of four equal tokens have half of the probability, and one the share 1."""
    equal = torch.zeros(4)
    assert len(kept(equal, Sampling(temperature=1.0, top_k=None, top_p=0.5))[1]) == 2
    assert len(kept(equal, Sampling(temperature=1.0, top_k=None, top_p=0.51))[1]) == 3
    assert len(kept(equal, Sampling(temperature=1.0, top_k=None, min_p=1.0))[1]) == 4


def test_draws_follow_the_probabilities():
    logits, generator = torch.tensor([0.5, 2.0, 1.0, -1.0]), torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=0.5, top_k=3)
    counts = torch.bincount(torch.tensor([draw(logits, sampling, generator) for _ in range(4000)]), minlength=4)
    expected = torch.softmax(torch.tensor([1.0, 4.0, 2.0, -torch.inf]), 0)
    torch.testing.assert_close(counts / 4000, expected, atol=0.025, rtol=0)
    assert {draw(logits, Sampling(temperature=0.7, top_k=1), generator) for _ in range(50)} == {1}
    assert {draw(logits, Sampling(temperature=5.0, top_k=99), generator) for _ in range(200)} == {0, 1, 2, 3}


def test_temperature_zero_takes_the_best_and_no_chance():
    logits, generator = torch.tensor([0.5, 2.0, 1.9]), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert draw(logits, Sampling(temperature=0), generator) == 1
    assert draw(logits, Sampling(temperature=0, repetition_penalty=1.5), generator, seen=[1]) == 2
    assert torch.equal(generator.get_state(), before)


def test_an_impossible_token_is_never_drawn():
    logits = torch.full((50,), -torch.inf)
    logits[7] = 1.0
    generator = torch.Generator().manual_seed(1)
    assert {draw(logits, Sampling(temperature=1.0, top_k=None), generator) for _ in range(100)} == {7}


def test_every_mistake_in_the_options_is_named_at_once():
    wrong = {"temperature": -1, "top_k": 0, "top_p": 0.0, "min_p": 1.5, "repetition_penalty": 0, "max_new_tokens": 0}
    with pytest.raises(ConfigError) as caught:
        read_options(**wrong, stop="", seed=-1, beyond_context="slide", top_n=3)
    subjects = [subject for subject, _ in caught.value.problems]
    for name in (*wrong, "seed", "beyond_context", "top_n"):
        assert any(subject.startswith(f"{name}=") for subject in subjects), name


def test_options_of_another_type_are_named_at_once():
    wrong = {"temperature": "hot", "top_k": "a", "top_p": [1], "min_p": True, "repetition_penalty": {}, "max_new_tokens": 2.5}
    with pytest.raises(ConfigError) as caught:
        read_options(**wrong, stop=5, seed=None, beyond_context=[1])
    assert {f"{subject} {rule}" for subject, rule in caught.value.problems} == {
        "temperature='hot' is no number; try 0.8",
        "top_k='a' is no whole number; try 50",
        "top_p=[1] is no number; try 0.9",
        "min_p=True is no number; try 0.05",
        "repetition_penalty={} is no number; try 1.2",
        "max_new_tokens=2.5 is no whole number; try 100",
        "stop=5 is neither a text nor a list of texts; try stop='.'",
        "seed=None is no whole number; try 0",
        "beyond_context=[1] is neither refuse nor window",
    }
    assert read_options(top_k=None, temperature=np.float32(0.5), seed=np.int64(3)).seed == 3


def test_one_stop_text_and_a_word_for_what_happens_beyond_the_context_will_do():
    options = read_options(stop="\n", beyond_context="window")
    assert options.stop == ("\n",) and options.beyond_context is Beyond.window
