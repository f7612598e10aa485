"""Training with copies of the weights: the same gradients as without, by the products and kernels that a GPU is given."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition, nop
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional

from llama_lab import compose
from llama_lab.config.schema import Recompute
from llama_lab.model import joined, loss, products
from llama_lab.model.llama import Llama
from llama_lab.model.products import WeightCopy, refresh
from llama_lab.model.rotary import rotary_tables, rotate
from llama_lab.training.buckets import GradientBuckets
from llama_lab.training.copies import hang, slots, take_down
from llama_lab.training.processes.worker import Place, Worker

ALONE = Worker(Place(), torch.device("cpu"))
SHAPES = {
    "plain": [],
    "tied": ["model.tie_embeddings=true"],
    "grouped": ["model.n_kv_heads=1"],
    "normed": ["model.qk_norm=true"],
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def small_llama(*overrides: str) -> Llama:
    shape = ["model.dim=64", "model.n_layers=2", "model.n_heads=2", *overrides]
    model = Llama(compose(shape).model, vocab_size=101, max_seq_len=16)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Not as training starts, where some matrices are zero and with them the gradients of others.
        parameter.data.normal_(mean=float(parameter.ndim == 1), std=0.15, generator=draw)
    return model


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 101, (3, 17), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, :5] = loss.IGNORE
    return tokens[:, :-1], targets


def hung(model: Llama, worker: Worker = ALONE) -> tuple[GradientBuckets, list[WeightCopy]]:
    places = slots(model)
    buckets = GradientBuckets(list(model.parameters()), worker, added=[place.weights for place in places if place.is_added_once])
    copies = hang(places, buckets, is_fp8=False)
    refresh(copies)
    return buckets, copies


def backward(model: Llama) -> float:
    tokens, targets = (part.to(model.embedding.weight.device) for part in windows())
    with torch.autocast(tokens.device.type, torch.bfloat16):
        nats = model(tokens, targets)
    (nats / 40).backward()
    return nats.item()


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_autograd(shape: str, device: str) -> None:
    """Two passes, so that the second adds to what the first has left; against float32 both are off by bfloat16's rounding."""
    exact, plain, copied = (small_llama(*SHAPES[shape]).to(device) for _ in range(3))
    buckets, _ = hung(copied)
    buckets.begin()
    for _ in range(2):
        (exact(*(part.to(device) for part in windows())) / 40).backward()
        assert backward(copied) == pytest.approx(backward(plain), rel=2e-3)
    for (name, parameter), other, reference in zip(copied.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None and reference.grad is not None
        off, usual = apart(parameter.grad, reference.grad), apart(other.grad, reference.grad)
        assert off < 1.5 * usual + 1e-3, name


@pytest.mark.parametrize("is_hung", [False, True])
@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_what_is_computed_again_gives_the_same_gradients(recompute: Recompute, is_hung: bool) -> None:
    """Bit for bit, dropout included."""
    kept, again = (small_llama("model.dropout=0.2") for _ in range(2))
    again.set_recompute(recompute)
    found = []
    for model in (kept, again):
        if is_hung:
            hung(model)[0].begin()
        torch.manual_seed(0)
        found.append([backward(model)])
        found[-1] += [parameter.grad for parameter in model.parameters()]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(*pair) for pair in zip(found[0][1:], found[1][1:], strict=True))


# torch's own compiler makes an object of the class when it looks into it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_step_compiles_whole_and_gives_the_same() -> None:
    eager, compiled = small_llama(), small_llama()
    for model in (eager, compiled):
        hung(model)[0].begin()
    compiled.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert backward(compiled) == pytest.approx(backward(eager), rel=1e-3)
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert apart(ours.grad, theirs.grad) < 0.01


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_forward_keeps_no_more_than_it_was_asked_to() -> None:
    """Also of what autograd functions of our own compute. In numbers a position and layer: the widths are 64 and 192."""
    torch.compiler.reset()
    kept = {recompute: numbers_kept(recompute) for recompute in Recompute}
    assert kept[Recompute.none] - kept[Recompute.selective] == pytest.approx(2 * 192 + 64, abs=2)
    assert kept[Recompute.full] == pytest.approx(64, abs=2)


def numbers_kept(recompute: Recompute) -> float:
    """How many numbers compiled forward keeps for backward for each position and layer, of those that grow with the layers."""
    positions, sizes = 48, []
    for layers in (2, 4):
        model = small_llama(f"model.n_layers={layers}")
        model.set_recompute(recompute)
        hung(model)[0].begin()
        sizes.append(0.0)

        def count(graph: torch.fx.GraphModule, inputs: object) -> object:
            (end,) = graph.graph.find_nodes(op="output")
            made = [node for node in end.args[0] if isinstance(node, torch.fx.Node) and node.op != "placeholder"]
            sizes[-1] += sum(node.meta["val"].numel() for node in made if isinstance(node.meta.get("val"), torch.Tensor))
            return make_boxed_func(graph.forward)

        partition = min_cut_rematerialization_partition
        backend = aot_autograd(fw_compiler=count, bw_compiler=nop, partition_fn=partition)
        model.compile(backend=backend, fullgraph=True, dynamic=False)
        backward(model)
    return (sizes[1] - sizes[0]) / 2 / positions


def test_without_gradients_the_copies_are_used_and_afterwards_nothing_is_left() -> None:
    model = small_llama()
    names = list(model.state_dict())
    tokens, targets = windows()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens, targets).item()
        _, copies = hung(model)
        assert model(tokens, targets).item() == pytest.approx(expected, rel=2e-3)
        for copy in copies:
            copy.weight.zero_()
        assert model(tokens, targets).item() != pytest.approx(expected, rel=2e-3)
        assert list(model.state_dict()) == names
        refresh(copies)
        assert model(tokens, targets).item() == pytest.approx(expected, rel=2e-3)
        take_down(slots(model))
        assert model(tokens, targets).item() == expected
    assert model(tokens, targets).dtype == torch.float32


def test_every_parameter_has_a_view_and_those_of_one_product_lie_below_each_other() -> None:
    model = small_llama("model.n_kv_heads=1")
    buckets, _ = hung(model)
    buckets.begin()
    attention = model.get_submodule("blocks.1.attention")
    total = buckets.total(attention.q.weight)
    total[:] = torch.arange(len(total)).float().unsqueeze(1)
    rows = [layer.weight.grad[:, 0].tolist() for layer in (attention.q, attention.k, attention.v)]
    assert [number for part in rows for number in part] == list(range(64 + 32 + 32))
    assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in model.parameters())
    buckets.begin()
    assert not total.any()


@pytest.fixture
def group(tmp_path) -> Iterator[Worker]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield replace(ALONE, place=Place(0, 1, 0, "here"))
    dist.destroy_process_group()


def test_buckets_are_sent_in_order_as_soon_as_all_in_them_is_added(group: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_lab.training.buckets.BUCKET_BYTES", 40_000)
    model = small_llama()
    buckets, _ = hung(model, group)
    sent: list[int] = []
    send = GradientBuckets._send
    monkeypatch.setattr(GradientBuckets, "_send", lambda self, flat: (sent.append(flat.numel()), send(self, flat)))
    buckets.begin()
    backward(model)
    assert sent == []
    buckets.last_pass()
    backward(model)
    early = list(sent)
    assert len(early) > 2
    buckets.finish()
    assert sum(sent) == sum(parameter.numel() for parameter in model.parameters())
    assert sent[: len(early)] == early
    assert len(sent) > len(early)
    assert products.ADDED
    buckets.release()
    assert not products.ADDED


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [100, 8193, 16384, 16385, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_on_a_gpu_is_that_of_float64(vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CUDA_CHUNK", vocab * 256)
    draw = torch.Generator("cuda").manual_seed(vocab)
    hidden = torch.randn(777, 256, device="cuda", generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, 256, device="cuda", generator=draw) * 0.2).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (777,), device="cuda", generator=draw)
    targets[::7] = loss.IGNORE
    nats = loss.summed_cross_entropy(hidden, weight, targets)
    (nats / 777).backward()
    wide_hidden, wide_weight = (part.detach().double().requires_grad_() for part in (hidden, weight))
    expected = functional.cross_entropy(wide_hidden @ wide_weight.t(), targets, reduction="sum", ignore_index=loss.IGNORE)
    (expected / 777).backward()
    exact = dtype is torch.float32
    assert nats.item() == pytest.approx(expected.item(), rel=1e-6 if exact else 1e-4)
    assert apart(hidden.grad, wide_hidden.grad) < (2e-6 if exact else 0.01)
    assert apart(weight.grad, wide_weight.grad) < (2e-6 if exact else 0.01)
    with torch.no_grad():
        assert loss.summed_cross_entropy(hidden, weight, targets).item() == nats.item()


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "width"), [(3, 1, 16, 100), (12, 12, 64, 2048), (4, 2, 96, 5632)])
def test_kernels_give_what_plain_torch_gives(heads: int, kv_heads: int, head_dim: int, width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    cos, sin = (torch.rand(7, head_dim // 2, generator=draw) for _ in range(2))
    values = torch.randn(14, (heads + 2 * kv_heads) * head_dim, generator=draw)
    turned = values.cuda()
    joined.rotate_heads(values, cos, sin, head_dim, heads + kv_heads)
    joined.rotate_heads(turned, cos.cuda(), sin.cuda(), head_dim, heads + kv_heads)
    torch.testing.assert_close(turned.cpu(), values)
    parts = [torch.randn(2, 7, count, head_dim, generator=draw).transpose(1, 2) for count in (heads, kv_heads, kv_heads)]
    on_gpu = [part.cuda() for part in parts[:2]] + [parts[2].contiguous().cuda()]
    torch.testing.assert_close(
        joined.pack_turned_back(*on_gpu, cos.cuda(), sin.cuda()).cpu(), joined.pack_turned_back(*parts, cos, sin)
    )
    both, gradient = torch.randn(5, 2 * width, generator=draw), torch.randn(5, width, generator=draw)
    for ours, plain in zip(joined.gate_gradient(both.cuda(), gradient.cuda()), joined.gate_gradient(both, gradient), strict=True):
        torch.testing.assert_close(ours.cpu(), plain)
    measured, largest = joined.measured_gate_gradient(both.cuda(), gradient.cuda())
    torch.testing.assert_close(measured, joined.gate_gradient(both.cuda(), gradient.cuda())[0])
    assert largest.amax() == measured.abs().amax()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_turned_as_the_model_turns_them_and_back(dtype: torch.dtype, device: str) -> None:
    cos, sin = (table.to(device) for table in rotary_tables(16, 7, 10_000.0))
    values = torch.randn(14, (3 + 2) * 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    heads = values.float().view(2, 7, 5, 16).transpose(1, 2)
    expected = torch.cat([rotate(heads[:, :4], cos, sin), heads[:, 4:]], dim=1)
    turned = values.clone()
    joined.rotate_heads(turned, cos, sin, 16, 4)
    by_head = turned.view(2, 7, 5, 16).transpose(1, 2)
    rounding = 0.02 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(by_head.float(), expected, atol=rounding, rtol=0)
    packed = joined.pack_turned_back(by_head[:, :3], by_head[:, 3:4], by_head[:, 4:], cos, sin)
    torch.testing.assert_close(packed, values, atol=2 * rounding, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [products.FORWARD_FP8, products.BACKWARD_FP8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 48), (300, 200), (256, 128)])
def test_float8_is_written_both_ways(rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
    """As torch rounds, which is to the nearest; a quotient on the edge between two values may go either way."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    values, turned, scale = products.quantised(x, dtype)
    limit = torch.finfo(dtype).max
    assert scale.item() == pytest.approx(x.abs().amax().item() / limit)
    assert values.float().abs().amax() == limit
    assert torch.equal(values.float(), turned.float().t())
    expected = (x.double() / scale.double()).clamp(-limit, limit).float().to(dtype).float()
    assert (values.float() != expected).double().mean() < 1e-3
    # Two bits of mantissa: half a step is an eighth of the value at most; below the least normal value steps are even.
    torch.testing.assert_close(values.float() * scale, x.float(), rtol=1 / 8, atol=2**-16 * scale.item() * 16)
    assert torch.equal(products.quantised(x, dtype, x.abs().amax())[0].float(), values.float())
    assert products.quantised(torch.zeros_like(x), dtype)[0].float().abs().amax() == 0


def test_the_gradient_of_the_gate_is_that_of_autograd() -> None:
    both = torch.randn(5, 2 * 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradient = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    gate, up = both.chunk(2, dim=-1)
    product = functional.silu(gate) * up
    product.backward(gradient)
    found, again = joined.gate_gradient(both.detach(), gradient)
    torch.testing.assert_close(found, both.grad)
    torch.testing.assert_close(again, product.detach())
    measured, largest = joined.measured_gate_gradient(both.detach(), gradient)
    assert torch.equal(measured, found)
    assert largest.amax() == found.abs().amax()


@pytest.mark.gpu
def test_float8_products_are_near_those_of_bfloat16() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    draw = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(96, 64, device="cuda", generator=draw) * 0.02
    x = torch.randn(4, 32, 64, device="cuda", generator=draw).bfloat16()
    upstream = (torch.randn(4, 32, 96, device="cuda", generator=draw) * 1e-4).bfloat16()
    results = []
    for is_fp8 in (False, True):
        copy = WeightCopy([weight], torch.zeros_like(weight), is_fp8=is_fp8)
        refresh([copy])
        leaf = x.clone().requires_grad_()
        product = copy(leaf)
        product.backward(upstream)
        results.append((product.detach(), leaf.grad, copy.total))
    for ours, plain in zip(results[1], results[0], strict=True):
        assert 0 < apart(ours, plain) < 0.08
