"""A model's shape as Hugging Face's config.json says it, in both directions. Torch-free.

Two classes compute what ours does: LlamaForCausalLM, and Qwen3ForCausalLM where queries and keys are normalised (`qk_norm`).
"""

from dataclasses import dataclass
from typing import Any

from llama_lab.config.schema import ModelConfig, Problem, RopeScaling
from llama_lab.model.count import ffn_dim

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Kinds of model that can be read and written -> the class that computes them."""
SCALING_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids that mean something to a generator.

    Attributes:
        bos: stands before a document.
        eos: ends it.
        pad: fills up short rows; None: there is none of its own.
    """

    bos: int
    eos: int
    pad: int | None


def hf_config(model: ModelConfig, *, vocab_size: int, max_seq_len: int, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Rotary settings are written as transformers 5 reads them (`rope_parameters`) and as 4 and most other readers do (`rope_theta`,
    `rope_scaling`).

    Args:
        vocab_size: rows of the embedding.
        max_seq_len: positions that the model was trained with.
        dtype: of the weights, as torch names it.
    """
    kind = "qwen3" if model.qk_norm else "llama"
    scaling = _rope_scaling(model)
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_size": model.dim,
        "intermediate_size": ffn_dim(model),
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.dim // model.n_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": model.rope_theta},
        "max_position_embeddings": max_seq_len,
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": vocab_size,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config | ({"use_sliding_window": False} if kind == "qwen3" else {"mlp_bias": False})


def model_of(config: dict[str, Any], found: list[Problem]) -> ModelConfig | None:
    """The shape that a config.json describes; what cannot be had is added to `found`.

    Fields that the file leaves out have the defaults of transformers, which it left out for being that.
    """
    kind = config.get("model_type")
    if kind not in CLASSES:
        classes = ", ".join(config.get("architectures") or ["unknown"])
        rule = f"({classes}) cannot be imported; Llama (model_type llama) and Qwen3 (model_type qwen3) can"
        found.append((f"model_type={kind}", rule))
        return None
    missing = [name for name in _NEEDED if not isinstance(config.get(name), int)]
    if missing:
        found.append(
            (", ".join(missing), "is missing, or no whole number" if len(missing) == 1 else "are missing, or no whole numbers")
        )
        return None
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or (128 if kind == "qwen3" else dim // heads)
    found += [(f"{key}={value}", rule) for key, value, rule in _unsupported(config, kind)]
    if head_dim * heads != dim:
        found.append((f"head_dim={head_dim}", f"times {heads} heads is not hidden_size={dim}, which this model needs"))
    model = ModelConfig(
        dim=dim,
        n_layers=config["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads") or heads,
        ffn_dim=config["intermediate_size"],
        multiple_of=1,
        rope_theta=float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=kind == "qwen3",
        zero_init_outputs=False,
        dropout=0.0,
    )
    _read_rope_scaling(config, model, found)
    found += model.problems("model")
    return model


_NEEDED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")


def _unsupported(config: dict[str, Any], kind: str) -> list[tuple[str, Any, str]]:
    """(key, value, why) of what this model does not compute."""
    rules = [
        ("hidden_act", "silu", "is not silu, the only activation here"),
        ("attention_bias", False, "adds biases, which this model has none of"),
        ("mlp_bias", False, "adds biases, which this model has none of"),
        ("use_sliding_window", False, "hides early positions, which this model does not"),
        ("quantization_config", None, "means quantised weights; import the model that they were made from"),
    ]
    return [(key, config[key], why) for key, usual, why in rules if key in config and config[key] not in (usual, None)]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, wherever the file keeps them."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _read_rope_scaling(config: dict[str, Any], model: ModelConfig, found: list[Problem]) -> None:
    """Set the model's rotary scaling to the file's."""
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1:
        found.append(("partial_rotary_factor", "leaves channels unturned, which this model does not"))
    if kind == "default":
        return
    if kind not in RopeScaling.__members__:
        found.append((f"rope_type={kind}", f"is not computed here; {', '.join(RopeScaling.__members__)} and default are"))
        return
    model.rope_scaling = RopeScaling[kind]
    if missing := [name for name in SCALING_NEEDS[kind] if not isinstance(rope.get(name), int | float)]:
        found.append((f"rope_type={kind}", f"needs {' and '.join(missing)} beside it"))
        return
    model.rope_factor = float(rope["factor"])
    if kind == "llama3":
        model.rope_original_len = int(rope["original_max_position_embeddings"])
        model.rope_low_freq, model.rope_high_freq = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """The scaling as config.json has it, without theta; None if there is none."""
    match model.rope_scaling:
        case None:
            return None
        case RopeScaling.linear:
            return {"rope_type": "linear", "factor": model.rope_factor}
        case RopeScaling.llama3:
            return {
                "rope_type": "llama3",
                "factor": model.rope_factor,
                "low_freq_factor": model.rope_low_freq,
                "high_freq_factor": model.rope_high_freq,
                "original_max_position_embeddings": model.rope_original_len,
            }
