"""What each weight of a model is called here, in a Hugging Face folder and in a GGUF file. Torch-free."""

from dataclasses import dataclass

from llama_lab.config.schema import ModelConfig


@dataclass(frozen=True, slots=True)
class Names:
    """One weight's three names."""

    ours: str
    huggingface: str
    gguf: str


OUTSIDE = (
    Names("embedding.weight", "model.embed_tokens.weight", "token_embd.weight"),
    Names("norm.weight", "model.norm.weight", "output_norm.weight"),
    Names("output.weight", "lm_head.weight", "output.weight"),
)
BLOCK = Names("blocks.{}.", "model.layers.{}.", "blk.{}.")
INSIDE = (
    Names("attention_norm.weight", "input_layernorm.weight", "attn_norm.weight"),
    Names("attention.q.weight", "self_attn.q_proj.weight", "attn_q.weight"),
    Names("attention.k.weight", "self_attn.k_proj.weight", "attn_k.weight"),
    Names("attention.v.weight", "self_attn.v_proj.weight", "attn_v.weight"),
    Names("attention.o.weight", "self_attn.o_proj.weight", "attn_output.weight"),
    Names("attention.q_norm.weight", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    Names("attention.k_norm.weight", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    Names("ffn_norm.weight", "post_attention_layernorm.weight", "ffn_norm.weight"),
    Names("ffn.gate.weight", "mlp.gate_proj.weight", "ffn_gate.weight"),
    Names("ffn.up.weight", "mlp.up_proj.weight", "ffn_up.weight"),
    Names("ffn.down.weight", "mlp.down_proj.weight", "ffn_down.weight"),
)
QK_NORMS = ("attention.q_norm.weight", "attention.k_norm.weight")


def weight_names(config: ModelConfig) -> list[Names]:
    """The names of every weight that a model of this shape has; a tied output projection is the embedding and has none."""
    found = [names for names in OUTSIDE if not (config.tie_embeddings and names.ours == "output.weight")]
    for layer in range(config.n_layers):
        block = Names(BLOCK.ours.format(layer), BLOCK.huggingface.format(layer), BLOCK.gguf.format(layer))
        for names in INSIDE:
            if config.qk_norm or names.ours not in QK_NORMS:
                whole = (block.ours + names.ours, block.huggingface + names.huggingface, block.gguf + names.gguf)
                found.append(Names(*whole))
    return found
