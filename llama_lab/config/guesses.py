"""What fields are called elsewhere: in other suites, in papers, in everyday speech."""

from collections.abc import Mapping, Sequence

BUDGET = "it counts tokens"
BATCH = "the first counts the tokens of an update, the second the windows that a device takes at once"
TEXT = "it goes with data=text"
AGAIN = "the same command goes on with a run by itself; fresh=true starts it anew"

_NAMES: tuple[tuple[str, str, str], ...] = (
    # (names elsewhere, fields here, what to add)
    ("learning_rate max_learning_rate peak_learning_rate peak_lr base_lr", "optim.max_lr", ""),
    ("min_learning_rate final_lr", "schedule.min_lr", ""),
    ("wd decay", "optim.weight_decay", ""),
    ("clip grad_clip clip_grad clip_grad_norm gradient_clip gradient_clip_val max_norm", "optim.max_grad_norm", ""),
    ("optimizer optimiser", "optim", ""),
    ("scheduler lr_scheduler lr_schedule", "schedule", ""),
    ("warmup warmup_steps warmup_iters num_warmup_steps", "schedule.warmup_updates", ""),
    ("batch bs batch_size train_batch_size global_batch_size", "data.tokens_per_update hardware.micro_batch", BATCH),
    ("micro_batch_size microbatch device_batch_size per_device_train_batch_size", "hardware.micro_batch", ""),
    ("grad_accum gradient_accumulation_steps accumulate", "hardware.micro_batch data.tokens_per_update", ""),
    ("epoch epochs num_epochs num_train_epochs max_epochs n_epochs", "training_tokens", BUDGET),
    ("step steps max_steps num_steps n_steps train_steps total_steps iters iterations max_iters", "training_tokens", BUDGET),
    ("update updates max_updates tokens max_tokens train_tokens num_tokens budget_tokens", "training_tokens", BUDGET),
    ("layers n_layer num_layers num_hidden_layers n_blocks blocks depth", "model.n_layers", ""),
    ("heads n_head num_heads num_attention_heads", "model.n_heads", ""),
    ("kv_heads num_kv_heads num_key_value_heads", "model.n_kv_heads", ""),
    ("width hidden_size hidden_dim d_model n_embd embed_dim emb_dim", "model.dim", ""),
    ("d_ff ffn_size intermediate_size ffn_hidden_size", "model.ffn_dim", ""),
    (
        "seq_len sequence_length seq_length max_length block_size context ctx context_length context_size n_ctx",
        "data.max_seq_len",
        "",
    ),
    ("vocab vocabulary n_vocab", "tokenizer.vocab_size", ""),
    ("text path file dataset corpus input data_path data_dir text_path train_file", "data.path", TEXT),
    ("dtype amp fp16 bf16 fp32 mixed_precision", "precision", ""),
    ("gpu gpus n_gpus num_gpus devices world_size nproc nproc_per_node", "hardware.processes", ""),
    ("log_every log_interval logging_steps", "log.every_updates", ""),
    ("eval_every eval_interval eval_steps val_every", "eval.every_updates", ""),
    ("save_every save_interval save_steps checkpoint_every", "checkpoint.every_tokens", ""),
    ("project_name run_name exp_name output_dir out_dir output out", "name", ""),
    ("preset config", "experiment", ""),
    ("resume continue restart auto_resume resume_from resume_from_checkpoint overwrite", "fresh", AGAIN),
    ("use_wandb no_wandb wandb_mode tracker report_to", "wandb", "wandb=null leaves it out"),
)

MEANT: Mapping[str, tuple[Sequence[str], str]] = {
    name: (keys.split(), note) for names, keys, note in _NAMES for name in names.split()
}
"""A name elsewhere -> (what it is here, by key path, and what to know of that)."""
SWITCHES = ("enabled", "enable", "active", "use", "on")
"""Fields by which nodes are switched on elsewhere. Here a node is off where it is null."""
OFF = ("false", "none", "no", "off", "disabled", "disable", "never")
"""Words that people type for null."""
ON = ("true", "yes", "on", "enabled", "enable", "1")
