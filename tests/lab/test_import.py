"""Imports: the weights are those of the folder, bit for bit, and a run trains on from them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llama_lab import compose, load
from llama_lab.cli import main
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config
from llama_lab.config.schema import FileTokenizerConfig
from llama_lab.formats.gguf_vocabulary import LETTERS, REST, gguf_vocabulary
from llama_lab.lab.transfer.export import export
from llama_lab.lab.transfer.import_run import import_run, look_up
from llama_lab.training.metrics import read_rows
from llama_lab.training.run_folder import extending_command
from llama_lab.training.saving.checkpoint import load_weights
from llama_lab.training.saving.manifest import list_checkpoints

from .exports import SHAPES, texts

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}


def tokenizer() -> Tokenizer:
    """Like Llama 3's: splits text by its expression, and puts a token before a text."""
    found = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}"), "isolated")
    found.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    found.train_from_iterator(["the model reads the text and the model learns again"] * 3, trainer)
    found.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    begin = found.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)])
    found.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return found


def make_folder(path: Path, *, rows: int = 0, dtype: torch.dtype = torch.float32, shard: str = "1GB", **config: Any) -> Path:
    """A folder as transformers writes it, of a Llama with random weights; `rows` pad its vocabulary."""
    import transformers

    torch.manual_seed(0)
    tokens = tokenizer()
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    shape |= {"max_position_embeddings": 256, "initializer_range": 0.2, "vocab_size": tokens.get_vocab_size() + rows}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(shape | config))).to(dtype)
    made.save_pretrained(path, max_shard_size=shard)
    tokens.save(str(path / "tokenizer.json"))
    return path


FOLDERS = {
    "llama 3": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "llama 2": {"rope_parameters": LINEAR, "num_key_value_heads": 4},
    "shards in half precision, padded": {"dtype": torch.bfloat16, "shard": "20KB", "rows": 11},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_import_predicts_what_transformers_does(name: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    folder = make_folder(tmp_path / "foreign", **FOLDERS[name])
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shards" in name)
    ours = load(import_run(folder, ["data.tokens_per_update=4096"], training=False))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert ours.run.data.max_seq_len == 256
    ids = torch.randint(ours.tokenizer.vocab_size, (256,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0, :, : ours.tokenizer.vocab_size]
    torch.testing.assert_close(ours.logits(ids.tolist()), expected, atol=2e-5, rtol=1e-5)
    assert gguf_vocabulary(ours.tokenizer).rule == "llama-bpe"


def newest(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(list_checkpoints(folder / "checkpoints")[-1])


def test_an_import_begins_texts_as_its_own_tokenizer_does(tmp_path: Path):
    """Until it is trained here, where documents are joined by the token that ends them."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = make_folder(tmp_path / "foreign", **FOLDERS["llama 3"])
    ours = load(import_run(folder, ["data.tokens_per_update=4096"], training=False))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    given = words("the model", return_tensors="pt")
    assert given["input_ids"][0, 0] == words.convert_tokens_to_ids("<|begin_of_text|>") == ours.tokenizer.start_id
    continued = theirs.generate(
        given["input_ids"], max_new_tokens=8, do_sample=False, eos_token_id=ours.tokenizer.eos_id, pad_token_id=0
    )
    expected = words.decode(continued[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert ours.generate("the model", max_new_tokens=8, temperature=0) == expected != ""


@pytest.mark.parametrize("name", SHAPES)
def test_an_import_of_an_export_has_the_same_weights(name: str, shaped_runs: dict[str, Path], tmp_path: Path):
    export(shaped_runs[name], tmp_path / name, target="hf")
    again = import_run(tmp_path / name, [], training=False)
    assert isinstance(again, Path)
    before, after = newest(shaped_runs[name]), newest(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[weight], after[weight]) for weight in before)
    first, second = load(shaped_runs[name]), load(again)
    assert first.tokenizer.hash == second.tokenizer.hash
    assert first.run.data.max_seq_len == second.run.data.max_seq_len
    assert torch.equal(first.logits(range(9)), second.logits(range(9)))


def test_a_tokenizer_survives_both_ways(tmp_path: Path):
    from transformers import AutoTokenizer

    folder = make_folder(tmp_path / "foreign")
    export(import_run(folder, [], training=False), tmp_path / "again", target="hf")
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    before = tokenizer()
    before.encode_special_tokens = True
    assert all(again(one).input_ids == before.encode(one).ids for one in texts(100))
    assert (again.bos_token, again.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_training_goes_on_from_the_weights(
    shaped_runs: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    export(shaped_runs["mha"], tmp_path / "foreign", target="hf")
    science = ["optim=adamw", "optim.max_lr=1e-4", "schedule=constant", "schedule.warmup_updates=0", "precision=fp32"]
    watching = ["eval.max_tokens=500", "sample=null", "wandb=null", "hardware=cpu", "log.every_updates=1"]
    data = ["data=text", f"data.path={text}", "training_tokens=2048", "data.tokens_per_update=512"]
    words = ["import", str(tmp_path / "foreign"), *science, *watching, *data, "name=on", "checkpoint.keep=2"]
    assert main([*words, "--no-training"]) == 0
    (folder,) = [path for path in (tmp_path / "outputs" / "on").iterdir() if path.name.startswith("foreign-")]
    assert [checkpoint.update for checkpoint in list_checkpoints(folder / "checkpoints")] == [0]
    assert main(words) == 0
    assert "Continuing after update 0 of 4" in capsys.readouterr().out
    # Where the rate falls from the start, nothing is gained by the weights that it began with.
    falling = replace(
        load_config(folder / "config.yaml"),
        schedule=compose(["schedule.warmup_updates=0", "schedule.cooldown_fraction=1.0"]).schedule,
    )
    assert [checkpoint.update for checkpoint in list_checkpoints(folder / "checkpoints")] == [0, 4]
    assert extending_command(falling, folder, 4096) == f"llama-lab fork {folder} --update 4 training_tokens=4096"
    rows = read_rows(folder / "metrics.jsonl")
    known = read_rows(shaped_runs["mha"] / "metrics.jsonl")[-1]["val/loss"]
    assert abs(rows[0]["train/loss"] - known) < 0.3
    assert not torch.equal(newest(folder)["embedding.weight"], newest(shaped_runs["mha"])["embedding.weight"])
    assert main(words) == 0
    assert "Already finished" in capsys.readouterr().out
    assert main(["verify", str(folder), "--updates", "2"]) == 0
    assert "reproduces it bit for bit" in capsys.readouterr().out


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        import_run(folder, list(overrides), training=False)
    return str(caught.value)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("foreign") / "model")


CHANGES = {
    "another architecture": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        "model_type=gpt2 (GPT2LMHeadModel) cannot be",
    ),
    "what is supported": ({"model_type": "mixtral"}, "Llama (model_type llama) and Qwen3 (model_type qwen3) can"),
    "biases": ({"attention_bias": True}, "attention_bias=True adds biases"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act=gelu is not silu"),
    "wide heads": ({"head_dim": 16}, "head_dim=16 times 4 heads is not hidden_size=32"),
    "yarn": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "rope_type=yarn is not computed here; linear,",
    ),
    "half a scaling": ({"rope_parameters": {"rope_type": "linear"}}, "rope_type=linear needs factor beside it"),
    "quantised": ({"quantization_config": {"bits": 4}}, "import the model that they were made from"),
    "no size": ({"hidden_size": None}, "hidden_size is missing"),
    "other shape": ({"intermediate_size": 40}, "mlp.gate_proj.weight is (48, 32), and config.json makes it (40, 32)"),
    "other depth": ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_folder_that_cannot_be_imported_is_refused(case: str, foreign: Path, tmp_path: Path):
    changes, said = CHANGES[case]
    folder = Path(shutil.copytree(foreign, tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert said in refusal(folder)


def test_files_that_are_missing_or_broken_are_named(foreign: Path, shaped_runs: dict[str, Path], tmp_path: Path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "holds no config.json" in refusal(tmp_path)
    assert "is a run of ours" in refusal(shaped_runs["mha"])
    folder = Path(shutil.copytree(foreign, tmp_path / "changed"))
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert "model.safetensors cannot be read" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "holds no weights; looked for model.safetensors, pytorch_model.bin" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}', encoding="utf-8")
    assert "model-1.safetensors is missing" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(foreign / "model.safetensors", folder)
    assert "holds no tokenizer.json; give one as tokenizer=file" in refusal(folder)


def test_what_the_weights_decide_cannot_be_typed(foreign: Path, tmp_path: Path):
    assert "model.n_layers=3 cannot be chosen" in refusal(foreign, "model.n_layers=3")
    assert "model= is the folder's" in refusal(foreign, "model=llama_97m")
    assert "would be trained anew" in refusal(foreign, "tokenizer=bpe")
    said = refusal(foreign, "tokenizer=bytes")
    assert "tokenizer=bytes is not the model's own, and the weights know other ids; leave it out" in said
    larger = tokenizer()
    larger.add_special_tokens(["<pad>", "<mask>"])
    larger.save(str(tmp_path / "larger.json"))
    count = larger.get_vocab_size()
    said = refusal(foreign, "tokenizer=file", f"tokenizer.path={tmp_path / 'larger.json'}")
    beyond = f"<pad> ({count - 2}), <mask> ({count - 1})"
    assert f"has ids up to {count - 1}, of them {beyond}, and the weights have {count - 2} rows" in said


PRESET = """\
# @package _global_
defaults:
  - base
  - override /tokenizer: bytes
  - _self_
model:
  dropout: 0.25
"""
BASE = """\
# @package _global_
data:
  max_seq_len: 16
  tokens_per_update: 512
"""


def test_what_a_preset_sets_counts_as_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Also what it takes from another; what is typed itself still goes before."""
    folder = make_folder(tmp_path / "foreign")
    presets = tmp_path / "own" / "experiment"
    presets.mkdir(parents=True)
    (presets / "mine.yaml").write_text(PRESET, encoding="utf-8")
    (presets / "base.yaml").write_text(BASE, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer=bytes is not the model's own, .* and experiment=mine if that sets it"):
        look_up(folder, ["experiment=mine"], config_dir=tmp_path / "own")
    own = ["tokenizer=file", f"tokenizer.path={folder / 'tokenizer.json'}"]
    for words, length in (([], 16), (["data.max_seq_len=8"], 8)):
        run = look_up(folder, ["experiment=mine", *own, *words], config_dir=tmp_path / "own").run
        assert (run.data.max_seq_len, run.model.dropout) == (length, 0.25)
        assert run.model.dim == 32
    run = look_up(folder, ["experiment=base"], config_dir=tmp_path / "own").run
    assert (run.data.max_seq_len, run.model.dropout) == (16, 0.0)
    assert isinstance(run.tokenizer, FileTokenizerConfig), "which no preset chose"


def test_a_preset_cannot_choose_what_the_weights_decide(foreign: Path, tmp_path: Path):
    said = refusal(foreign, "experiment=smoke")
    assert "experiment=smoke sets model.dim=" in said and "and the weights decide the model; use a preset without that" in said
    chosen = ["experiment=seed_small", f"data.path={tmp_path}", f"tokenizer.path={foreign / 'tokenizer.json'}"]
    assert "experiment=seed_small sets model=llama_97m, and" in refusal(foreign, *chosen)


SCALINGS = {
    "model.rope_factor=2.0": "has no effect without model.rope_scaling; try model.rope_scaling=linear",
    "model.rope_factor=0.5": "is below 1; 1 leaves the wavelengths as they are",
    "model.rope_high_freq=0.5": "is not above model.rope_low_freq=1.0; try 4",
    "model.rope_original_len=0": "is below 1; try 8192",
}


@pytest.mark.parametrize("word", SCALINGS)
def test_a_scaling_that_makes_no_sense_is_refused(word: str):
    with pytest.raises(ConfigError) as caught:
        compose([word])
    assert f"{word} {SCALINGS[word]}" in str(caught.value)
