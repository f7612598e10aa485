"""The whole model against references, and the invariants that a causal language model has."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llama_lab.config.targets import IGNORE
from llama_lab.model import attention
from llama_lab.model.cache import KVCache
from llama_lab.model.llama import Llama

VARIANTS = {
    "mha": {},
    "gqa": {"n_kv_heads": 2, "rope_theta": 500_000.0},
    "one_kv_head": {"n_kv_heads": 1},
    "tied": {"tie_embeddings": True, "n_kv_heads": 2},
    "odd_sizes": {"dim": 36, "n_heads": 6, "n_kv_heads": 3, "ffn_dim": 41, "n_layers": 3},
}
QK_NORM = {"qk_norm": True, "n_kv_heads": 2, "norm_eps": 0.01}


def some_tokens(model: Llama, batch: int = 3) -> Tensor:
    return torch.randint(model.vocab_size, (batch, model.max_seq_len), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=["explicit", "fused"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which a CPU computes attention."""
    if request.param == "fused":
        monkeypatch.setattr(attention, "LONGEST_EXPLICIT", 0)
    return request.param


def reference_logits(state: dict[str, Tensor], model: Llama, tokens: Tensor) -> Tensor:
    """The model once more, head by head and query by query, from the papers' formulas."""
    config = model.config
    head_dim = config.dim // config.n_heads
    kv_heads = config.n_kv_heads or config.n_heads

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * gain

    def turn(vector: Tensor, position: int) -> Tensor:
        turned = []
        for channel in range(head_dim):
            pair = channel % (head_dim // 2)
            angle = torch.tensor(position / config.rope_theta ** (2 * pair / head_dim), dtype=torch.float64)
            partner = -vector[channel + head_dim // 2] if channel < head_dim // 2 else vector[channel - head_dim // 2]
            turned.append(vector[channel] * angle.cos() + partner * angle.sin())
        return torch.stack(turned)

    def attend(x: Tensor, layer: str) -> Tensor:
        heads = []
        for head in range(config.n_heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            group = head // (config.n_heads // kv_heads)
            shared = slice(group * head_dim, (group + 1) * head_dim)
            q, k = x @ state[f"{layer}.q.weight"][own].T, x @ state[f"{layer}.k.weight"][shared].T
            v = x @ state[f"{layer}.v.weight"][shared].T
            if config.qk_norm:
                q, k = norm(q, state[f"{layer}.q_norm.weight"]), norm(k, state[f"{layer}.k_norm.weight"])
            q = torch.stack([turn(row, position) for position, row in enumerate(q)])
            k = torch.stack([turn(row, position) for position, row in enumerate(k)])
            rows = [(k[: t + 1] @ q[t] / math.sqrt(head_dim)).softmax(0) @ v[: t + 1] for t in range(len(x))]
            heads.append(torch.stack(rows))
        return torch.cat(heads, dim=-1) @ state[f"{layer}.o.weight"].T

    outputs = []
    for sequence in tokens:
        x = state["embedding.weight"][sequence]
        for index in range(config.n_layers):
            block = f"blocks.{index}"
            x = x + attend(norm(x, state[f"{block}.attention_norm.weight"]), f"{block}.attention")
            y = norm(x, state[f"{block}.ffn_norm.weight"])
            gate, up = y @ state[f"{block}.ffn.gate.weight"].T, y @ state[f"{block}.ffn.up.weight"].T
            x = x + (gate * gate.sigmoid() * up) @ state[f"{block}.ffn.down.weight"].T
        output = state["embedding.weight" if config.tie_embeddings else "output.weight"]
        outputs.append(norm(x, state["norm.weight"]) @ output.T)
    return torch.stack(outputs)


@pytest.mark.parametrize("changes", [*VARIANTS.values(), QK_NORM], ids=[*VARIANTS, "qk_norm"])
def test_logits_and_gradients_equal_a_naive_float64_reference(llama, changes, kernel):
    model = llama(max_seq_len=7, **changes)
    tokens = some_tokens(model, batch=2)
    targets = some_tokens(model, batch=2).flip(1)
    targets[0, 3] = IGNORE
    state = {name: weight.detach().double().requires_grad_() for name, weight in model.state_dict().items()}
    logits = reference_logits(state, model, tokens)
    functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    torch.testing.assert_close(model(tokens), logits.float(), atol=1e-5, rtol=1e-5)

    model(tokens, targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad.float(), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers(llama, changes):
    transformers = pytest.importorskip("transformers")
    model = llama(max_seq_len=64, **changes)
    config = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.ffn_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_seq_len,
        )
    ).eval()
    renamed = {
        "embedding": "model.embed_tokens",
        "blocks.": "model.layers.",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.": "self_attn.",
        "ffn.": "mlp.",
    } | {f".{name}.weight": f".{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    state = {}
    for name, weight in model.state_dict().items():
        for ours, their in renamed.items():
            name = name.replace(ours, their)
        state[{"norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}.get(name, name)] = weight
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    tokens = some_tokens(model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_later_token_changes_no_earlier_logit_by_a_single_bit(llama, kernel):
    model = llama(n_kv_heads=2)
    tokens = some_tokens(model)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % model.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(dim=-1).all()


def test_grouped_heads_equal_full_heads_with_repeated_weights(llama):
    grouped, full = llama(n_kv_heads=2), llama(n_kv_heads=4)
    state = grouped.state_dict()
    for name in state:
        if name.endswith((".k.weight", ".v.weight")):
            heads = state[name].unflatten(0, (2, -1))
            state[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = some_tokens(grouped)
    torch.testing.assert_close(grouped(tokens), full(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dim", "vocab_size"), [(64, 257), (1024, 2048)])
@pytest.mark.parametrize("zero", [False, True])
def test_the_first_loss_is_near_that_of_guessing(shape, dim, vocab_size, tied, zero):
    config = shape(dim=dim, ffn_dim=2 * dim, tie_embeddings=tied, zero_init_outputs=zero)
    model = Llama(config, vocab_size=vocab_size, max_seq_len=24)
    model.initialise(torch.Generator().manual_seed(0))
    tokens = some_tokens(model, batch=16)
    loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    assert loss.item() == pytest.approx(math.log(vocab_size), abs=0.1)


def test_initial_weights_follow_the_seed_alone(llama, shape):
    global_state = torch.random.get_rng_state()
    model, other = (Llama(shape(), vocab_size=61, max_seq_len=24) for _ in range(2))
    assert all(parameter.isnan().all() for parameter in model.parameters() if parameter.ndim > 1)
    model.initialise(torch.Generator().manual_seed(5))
    other.initialise(torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(global_state, torch.random.get_rng_state())
    assert model.blocks[0].ffn.gate.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[0].ffn.down.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    other.initialise(torch.Generator().manual_seed(6))
    assert not torch.equal(model.embedding.weight, other.embedding.weight)
    zeros = Llama(shape(zero_init_outputs=True), vocab_size=61, max_seq_len=24)
    zeros.initialise(torch.Generator().manual_seed(5))
    assert not zeros.blocks[1].attention.o.weight.any() and not zeros.blocks[1].ffn.down.weight.any()


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "qk_norm": True}], ids=["mha", "gqa"])
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(llama, changes, kernel):
    model = llama(**changes)
    tokens = some_tokens(model)
    whole = model(tokens)
    cache = KVCache(model.config, batch=3, max_len=24, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split([5, 1, 1, 6, 1, 10], dim=1)]
    assert cache.length == 24
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="25 positions do not fit a context of 24"):
        model(tokens[:, :1], cache=cache)


def test_a_context_that_is_too_long_is_refused(llama):
    with pytest.raises(ValueError, match="25 positions do not fit a context of 24"):
        llama()(torch.zeros(1, 25, dtype=torch.int64))


def test_state_names_are_stable(llama):
    names = list(llama(n_layers=1, qk_norm=True).state_dict())
    assert names == [
        "embedding.weight",
        "blocks.0.attention_norm.weight",
        *(f"blocks.0.attention.{name}.weight" for name in ("q", "k", "v", "o", "q_norm", "k_norm")),
        "blocks.0.ffn_norm.weight",
        *(f"blocks.0.ffn.{name}.weight" for name in ("gate", "up", "down")),
        "norm.weight",
        "output.weight",
    ]
    assert "output.weight" not in llama(tie_embeddings=True).state_dict()


def test_autocast_keeps_activations_in_bf16_and_the_loss_in_fp32(llama):
    model = llama(n_kv_heads=2)
    tokens, seen = some_tokens(model), []
    hooks = [block.register_forward_hook(lambda block, inputs, output: seen.append(output.dtype)) for block in model.blocks]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        assert model(tokens).dtype == torch.bfloat16
    for hook in hooks:
        hook.remove()
    assert set(seen) == {torch.bfloat16} and loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert loss.item() == pytest.approx(model(tokens[:, :-1], tokens[:, 1:]).item(), rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_training_step_compiles_without_graph_breaks(llama, precision):
    model = llama(n_kv_heads=2)
    tokens = some_tokens(model)

    def gradients(step) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            step(tokens, tokens.roll(-1, 1)).backward()
        return [parameter.grad for parameter in model.parameters()]

    plain = gradients(model)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager"))
    for one, other in zip(plain, compiled, strict=True):
        difference = (one - other).norm() / one.norm()
        assert difference < (1e-5 if precision == "fp32" else 0.05)


def test_dropout_acts_in_training_only(llama):
    model = llama(dropout=0.5)
    tokens = some_tokens(model)
    torch.manual_seed(0)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
