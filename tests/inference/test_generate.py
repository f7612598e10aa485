"""Generation: the cache changes nothing, chance comes from the generator alone, and the model is left as it was."""

from itertools import islice

import pytest
import torch

from llama_lab.config.schema import ModelConfig
from llama_lab.inference.generate import continuation, draw, generate
from llama_lab.model.llama import Llama

CONTEXT = 12


@pytest.fixture(scope="module")
def model() -> Llama:
    """A small model, sure enough of itself that no two logits are nearly equal. It is in training mode, with dropout."""
    config = ModelConfig(
        dim=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        ffn_dim=24,
        multiple_of=8,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        qk_norm=False,
        zero_init_outputs=False,
        dropout=0.5,
    )
    model = Llama(config, vocab_size=31, max_seq_len=CONTEXT)
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.ndim > 1 else 1))
    return model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uncached(model: Llama, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens, each from a fresh look at the whole context, by the documented rule of what the context is."""
    model.eval()
    context, output = prompt[-CONTEXT:], []
    with torch.no_grad():
        for _ in range(new_tokens):
            if len(context) > CONTEXT:
                context = context[-(CONTEXT // 2) :]
            output.append(int(model(torch.tensor([context]))[0, -1].argmax()))
            context = [*context, output[-1]]
    model.train()
    return output


@pytest.mark.parametrize("length", [1, 5, CONTEXT - 1, CONTEXT, CONTEXT + 8])
def test_greedy_tokens_are_those_of_no_cache_even_beyond_the_context(model, length):
    prompt = torch.randint(31, (length,), generator=seeded()).tolist()
    expected = uncached(model, prompt, 3 * CONTEXT)
    assert generate(model, [prompt], new_tokens=3 * CONTEXT, temperature=0.0, generator=seeded()) == [expected]
    assert len(set(expected)) > 3


def test_draws_come_from_the_generator_alone(model):
    def texts(seed: int) -> list[list[int]]:
        return generate(model, [[1], [2, 3]], new_tokens=20, temperature=1.0, top_k=5, generator=seeded(seed))

    global_state = torch.random.get_rng_state()
    assert texts(0) == texts(0) != texts(1)
    assert torch.equal(global_state, torch.random.get_rng_state())


def test_the_model_is_left_as_it_was(model):
    weights = [parameter.clone() for parameter in model.parameters()]
    assert model.training
    generate(model, [[1]], new_tokens=3, temperature=1.0, generator=seeded())
    tokens = continuation(model, [1], temperature=1.0, generator=seeded())
    next(tokens)
    assert torch.is_grad_enabled()
    tokens.close()
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(one, other) and one.grad is None for one, other in zip(model.parameters(), weights, strict=True))


def test_a_text_ends_where_its_end_is_drawn_and_forbidden_tokens_never_come(model):
    greedy = generate(model, [[7]], new_tokens=20, temperature=0.0, generator=seeded())[0]
    end = greedy[4]
    assert generate(model, [[7]], new_tokens=20, temperature=0.0, generator=seeded(), eos_id=end) == [greedy[: greedy.index(end)]]
    others = generate(model, [[7]], new_tokens=200, temperature=2.0, generator=seeded(), forbidden_ids=greedy)[0]
    assert len(others) == 200 and not set(others) & set(greedy)


def test_tokens_come_as_they_are_asked_for(model):
    endless = continuation(model, [7], temperature=0.0, generator=seeded())
    assert list(islice(endless, 20)) == generate(model, [[7]], new_tokens=20, temperature=0.0, generator=seeded())[0]
    endless.close()


def test_draws_follow_temperature_and_top_k():
    logits = torch.tensor([0.5, 2.0, 1.0, -1.0])
    generator = seeded()
    counts = torch.bincount(torch.tensor([draw(logits, 0.5, 3, generator) for _ in range(4000)]), minlength=4)
    expected = torch.softmax(torch.tensor([1.0, 4.0, 2.0, -torch.inf]), 0)
    torch.testing.assert_close(counts / 4000, expected, atol=0.025, rtol=0)
    assert {draw(logits, 0.7, 1, generator) for _ in range(50)} == {1}
    assert draw(logits, 0.0, None, generator) == 1
    assert {draw(logits, 5.0, 99, generator) for _ in range(200)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "an empty prompt"),
        ([3, 31], {}, "prompt ids 3 to 31 are not all in a vocabulary of 31"),
        ([-1], {}, "prompt ids -1 to -1"),
        ([1], {"temperature": -0.5}, "temperature=-0.5 is below 0"),
        ([1], {"top_k": 0}, "top_k=0 is below 1"),
    ],
)
def test_mistakes_are_named(model, prompt, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [prompt], new_tokens=1, **({"temperature": 1.0, "generator": seeded()} | changes))
