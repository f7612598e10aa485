"""Peak memory of training on a GPU, from the config alone: what lies there all the time, what forward keeps for backward, and what
is there only for a moment. Torch-free; `tests/lab/plan_bars.py` holds it to what the allocator says.

Every term is counted from the code that makes it. Which activations are kept follows from what the products keep of their inputs
(`model.products`, `model.joined`) and from what torch.compile's min-cut partitioner decides to keep of the rest; it was read off
the forward graphs that it makes of this model. Bytes are for each position of a micro-batch; w is the bytes of an activation, d the
model's width, f that of the feed-forward layer, q and k the channels of queries and of keys.
"""

from dataclasses import dataclass

from llama_lab.config.schema import Compile, ModelConfig, MuonConfig, Precision, Recompute, RunConfig, Window
from llama_lab.model.count import ffn_dim, parameters

FP32, BF16, FP8 = 4, 2, 1
LOSS_LOGITS = 2**27
"""Logits that the loss holds at once; see `model.loss`."""
WORKSPACE = 64 * 2**20
"""What cuBLAS and cuBLASLt take of torch's allocator to work in on a Hopper GPU: 32 MiB each."""


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes on one GPU at the moment when most are held.

    Attributes:
        weights: in float32, and the copies that products are computed with.
        gradients: in float32, those that are there from one moment to the next.
        optimizer: its states.
        passing: activations and all else that comes and goes, workspaces included.
        moment: when most of that is there.
    """

    weights: int
    gradients: int
    optimizer: int
    passing: int
    moment: str

    @property
    def gib(self) -> float:
        """All of it."""
        return (self.weights + self.gradients + self.optimizer + self.passing) / 2**30


def gpu_memory(run: RunConfig, vocab_size: int, micro_batch: int) -> GpuMemory:
    """What a process of a run holds at its peak.

    Gradients in buckets are there from the start. Without buckets (float32, one process) autograd makes them anew in each backward,
    and they stay only where those of a further micro-batch are added.

    Args:
        run: resolved, on CUDA.
        micro_batch: windows at once.
    """
    model, is_wide, processes = run.model, run.precision is Precision.fp32, run.hardware.processes or 1
    numbers, embedding = parameters(model, vocab_size), vocab_size * model.dim
    share = -(-run.windows_per_update // processes)
    positions = min(micro_batch, share) * run.data.max_seq_len
    layer = _Layer(run)
    kept = positions * model.n_layers * layer.kept
    if run.data.window is Window.packed:
        kept += positions * run.data.max_seq_len * (FP32 if is_wide else BF16)  # the mask of all layers
    if model.dropout:
        kept += positions * model.dim
    has_buckets = processes > 1 or not is_wide
    # What backward makes beside: of a model with copies the embedding's gradient alone, as a table of inputs.
    made = FP32 * (numbers if is_wide else embedding)
    block = positions * (layer.once + layer.working)
    moments = {
        "in the loss": kept + positions * layer.width + _loss(run, vocab_size, positions),
        "in the backward of the last block": kept + block,
        "in the backward of the first block": positions * layer.kept + block + made,
        "in the optimizer's step": _step(run) + (0 if has_buckets else made),
    }
    moment = max(moments, key=lambda name: moments[name])
    return GpuMemory(
        weights=FP32 * numbers + _copies(run, numbers, embedding),
        gradients=FP32 * numbers if has_buckets or share > micro_batch else 0,
        optimizer=_states(run, numbers, embedding),
        passing=moments[moment] + WORKSPACE,
        moment=moment,
    )


class _Layer:
    """Bytes of one block for each position.

    Attributes:
        width: of the residual stream.
        kept: by forward for backward.
        once: what backward computes again, for one block at a time.
        working: what the backward of the feed-forward layer holds beside that; it is more than attention's.
    """

    def __init__(self, run: RunConfig) -> None:
        model = run.model
        is_wide, compiled = run.precision is Precision.fp32, run.hardware.compile is Compile.always
        w = FP32 if is_wide else BF16
        d, f = model.dim, ffn_dim(model)
        kv = _kv_dim(model)
        # Packed documents have a mask, and attention with one wants as many key heads as query heads.
        heads = d + 2 * (d if run.data.window is Window.packed else kv)
        self.width = w * d
        norm = _norm(run, compiled)
        # Queries, keys, values, their mixture, and the logarithm of softmax's denominator for each head.
        attention = w * (heads + d) + FP32 * model.n_heads
        if model.qk_norm:
            attention += w * (d + kv) + FP32 * (d + kv) * model.n_heads // d
        # A byte of mask for each channel that a branch adds; compiled, masks are drawn again but for the last.
        dropped = 2 * d if model.dropout and not compiled else 0
        feed = norm + w * 2 * f
        if is_wide:
            # Autograd's own products keep their inputs: silu(gate) * up too, and without a compiler silu(gate) as well.
            feed += w * f * (1 if compiled else 2)
        if run.precision is Precision.fp8:
            attention += FP8 * d
            feed += FP8 * f
        mix = norm + attention
        match run.hardware.recompute:
            case Recompute.none:
                self.kept, self.once = mix + feed + dropped, 0
            case Recompute.selective:
                # Between the two halves the stream is kept.
                self.kept, self.once = mix + dropped // 2 + self.width, feed - self.width + dropped // 2
            case Recompute.full:
                self.kept, self.once = self.width, mix + feed - self.width + dropped
        # The gradients of the residual stream, of silu(gate) * up, of gate and up, and silu(gate) * up once more.
        self.working = w * d + w * 4 * f


def _norm(run: RunConfig, compiled: bool) -> int:
    """Bytes that a norm and what it feeds keep: the stream that it read, what it wrote, and 1 / rms."""
    d, is_wide = run.model.dim, run.precision is Precision.fp32
    w = FP32 if is_wide else BF16
    if compiled:
        # A float8 product keeps its input in float8, turned.
        return w * d + (FP8 if run.precision is Precision.fp8 else w) * d + FP32
    # Without a compiler also the stream in float32, and the normalised stream before its gains.
    return w * d + 2 * FP32 * d + FP32


def _loss(run: RunConfig, vocab_size: int, positions: int) -> int:
    """Bytes of the loss: the last norm's output, the gradient of that, the weight's in float32, and some logits."""
    w = FP32 if run.precision is Precision.fp32 else BF16
    chunk = max(128, LOSS_LOGITS // vocab_size // 128 * 128)
    return positions * 2 * w * run.model.dim + FP32 * vocab_size * run.model.dim + w * vocab_size * min(chunk, positions)


def _copies(run: RunConfig, numbers: int, embedding: int) -> int:
    """Bytes of the weights' copies: all matrices but an embedding that is only looked up; two more in float8 inside the blocks."""
    if run.precision is Precision.fp32:
        return 0
    inside = numbers - embedding * (1 if run.model.tie_embeddings else 2)
    return BF16 * (inside + embedding) + (2 * FP8 * inside if run.precision is Precision.fp8 else 0)


def _states(run: RunConfig, numbers: int, embedding: int) -> int:
    """Bytes of the optimizer's states."""
    outside = embedding * (1 if run.model.tie_embeddings else 2)
    return run.optim.state_bytes(numbers - outside, outside)


def _step(run: RunConfig) -> int:
    """Bytes that the optimizer's step takes for a moment: none but with Muon, which works on all matrices of a shape at once."""
    if not isinstance(run.optim, MuonConfig):
        return 0
    model, f, w = run.model, ffn_dim(run.model), FP32 if run.precision is Precision.fp32 else BF16
    kv = _kv_dim(model)
    shapes: dict[tuple[int, int], int] = {}
    for shape in [(model.dim, model.dim)] * 2 + [(kv, model.dim)] * 2 + [(f, model.dim)] * 2 + [(model.dim, f)]:
        shapes[shape] = shapes.get(shape, 0) + model.n_layers
    largest = 0
    for (rows, columns), count in shapes.items():
        stack, squares = count * rows * columns, count * min(rows, columns) ** 2
        # The iteration's three stacks and two squares; not compiled, gradients and directions in float32 are there beside them.
        beside = 0 if run.hardware.compile is Compile.always else 2 * FP32
        largest = max(largest, stack * (3 * w + beside) + squares * 2 * w)
    return largest


def _kv_dim(model: ModelConfig) -> int:
    """Channels of the keys."""
    return model.dim // model.n_heads * model.kv_heads
