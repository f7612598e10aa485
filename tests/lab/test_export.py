"""Exports: others read the same weights, make the same tokens of a text, and predict the same."""

import ast
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_lab import compose, load
from llama_lab.cli import main
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config, save_config
from llama_lab.lab.transfer.export import export
from llama_lab.training.saving.checkpoint import load_weights
from llama_lab.training.saving.manifest import list_checkpoints

from .exports import SHAPES, texts


@pytest.fixture(scope="module")
def folders(shaped_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each run as a folder of Hugging Face."""
    found = {name: tmp_path_factory.mktemp("exports") / name for name in shaped_runs}
    for name, out in found.items():
        export(shaped_runs[name], out, target="hf")
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, shaped_runs, folders):
    from transformers import AutoModelForCausalLM

    ours, theirs = load(shaped_runs[name]), AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if name == "normalised" else "LlamaForCausalLM")
    assert theirs.dtype == torch.float32
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids = torch.randint(ours.tokenizer.vocab_size, (ours.run.data.max_seq_len,), generator=draw)
        with torch.no_grad():
            expected = theirs(ids[None]).logits[0]
        torch.testing.assert_close(ours.logits(ids.tolist()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_token_ids_equal_transformers(name: str, shaped_runs, folders):
    from transformers import AutoTokenizer

    ours, theirs = load(shaped_runs[name]).tokenizer, AutoTokenizer.from_pretrained(folders[name])
    theirs.model_max_length = 10**6
    for text in texts(1000):
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids, repr(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), repr(text)
    assert theirs.bos_token_id == theirs.eos_token_id == ours.eos_id


def test_an_export_generates_up_to_its_context(shaped_runs, folders):
    from transformers import AutoModelForCausalLM

    ours, theirs = load(shaped_runs["gqa"]), AutoModelForCausalLM.from_pretrained(folders["gqa"]).eval()
    ids = [ours.tokenizer.eos_id, *ours.tokenizer.encode("the model")]
    made = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False)[0].tolist()
    room = ours.run.data.max_seq_len - len(ids)
    assert made[len(ids) :] in (greedy(ours, ids, room), [*greedy(ours, ids, room), ours.tokenizer.eos_id])


def greedy(run, ids: list[int], count: int) -> list[int]:
    """The most likely tokens, without a cache, up to the document's end."""
    found = list(ids)
    while len(found) - len(ids) < count and (token := int(run.logits(found)[-1].argmax())) != run.tokenizer.eos_id:
        found.append(token)
    return found[len(ids) :]


def test_the_card_says_what_was_done(shaped_runs, folders):
    card = (folders["mha"] / "README.md").read_text(encoding="utf-8")
    headings = ("## Use", "## Verdicts", "## Curve", "## Data", "## Config", "## Where it came from")
    for said in (*headings, "finished, 8 of 8 updates", "](loss.png)", "| model.n_layers | 2 |"):
        assert said in card
    fingerprint = json.loads((shaped_runs["mha"] / "meta.json").read_text())["data"]["data"]
    assert fingerprint in card
    last = [json.loads(line) for line in (shaped_runs["mha"] / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"loss {last['val/loss']:.4f} nats a token" in card
    assert f"({last['val/bits_per_byte']:.3f} against " in card
    assert os.uname().nodename not in card if hasattr(os, "uname") else True
    assert (folders["mha"] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_tells_the_last_score_of_each_task(shaped_runs, tmp_path: Path):
    run = Path(shutil.copytree(shaped_runs["mha"], tmp_path / "run"))
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as rows:
        for update, accuracy in ((4, 0.25), (8, 0.5)):
            row = {"update": update, "tokens": 512 * update, "task/our/accuracy": accuracy, "task/our/accuracy_norm": None}
            rows.write(json.dumps(row) + "\n")
    export(run, tmp_path / "out", target="hf")
    assert "- Task our: accuracy 0.5\n" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt", ["ROMEO:\n", 'He said "no"', "a\\nb \\", "it's 🙂", "`x` $HOME"])
def test_the_card_shows_code_that_runs_whatever_the_prompt(prompt: str, shaped_runs, tmp_path: Path):
    run = Path(shutil.copytree(shaped_runs["mha"], tmp_path / "run"))
    config = load_config(run / "config.yaml")
    save_config(replace(config, sample=replace(compose([]).sample, prompts=[prompt])), run / "config.yaml")
    out = tmp_path / 'my "best" model'
    export(run, out, target="hf")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert {prompt, out.name} <= constants(fenced(card, "python"))
    serve, evaluate = re.findall(r"`((?:vllm|lm_eval) [^`]*)`", card)
    assert shlex.split(serve) == ["vllm", "serve", out.name]
    assert shlex.split(evaluate)[-1] == f"pretrained={out.name}"
    pytest.importorskip("gguf")
    export(run, tmp_path / "gg uf", target="gguf")
    command = fenced((tmp_path / "gg uf" / "README.md").read_text(encoding="utf-8"), "")
    assert shlex.split(command) == ["llama-cli", "-m", "gg uf/model.gguf", "-p", prompt, "-n", "40", "-no-cnv"]


def test_the_card_asks_for_what_the_run_was_asked_for(shaped_runs, tmp_path: Path):
    run = Path(shutil.copytree(shaped_runs["mha"], tmp_path / "run"))
    save_config(replace(load_config(run / "config.yaml"), sample=compose([]).sample), run / "config.yaml")
    rows = [{"prompt": "by set", "set": "summary"}, {"prompt": "Es war", "set": None}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    export(run, tmp_path / "out", target="hf")
    assert "Es war" in constants(fenced((tmp_path / "out" / "README.md").read_text(encoding="utf-8"), "python"))


def fenced(card: str, language: str) -> str:
    """The first block of code in a card."""
    return card.partition(f"```{language}\n")[2].partition("\n```")[0]


def constants(code: str) -> set[Any]:
    """The texts and numbers in some Python, which has to parse."""
    return {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}


def test_what_is_typed_next_knows_paths_with_spaces(shaped_runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "it's my model"
    run = Path(shutil.copytree(shaped_runs["mha"], tmp_path / "run"))
    prompt = 'it\'s "Über" uns'
    config = replace(load_config(run / "config.yaml"), sample=replace(compose([]).sample, prompts=[f"{prompt}\nand so on"]))
    save_config(config, run / "config.yaml")
    assert main(["export", str(run), "--to", "hf", "--out", str(out)]) == 0
    words = shlex.split(capsys.readouterr().out.partition("Try it: ")[2])
    assert words[:2] == ["python", "-c"] and len(words) == 3
    assert {"text-generation", str(out), prompt} == constants(words[2])
    pytest.importorskip("gguf")
    out = tmp_path / "another model"
    assert main(["export", str(run), "--to", "gguf", "--out", str(out)]) == 0
    words = shlex.split(capsys.readouterr().out.partition("Try it: ")[2])
    assert words == ["llama-cli", "-m", f"{out}/model.gguf", "-p", prompt]


def test_another_checkpoint_and_another_dtype(shaped_runs, tmp_path: Path):
    from safetensors.torch import load_file

    files = export(shaped_runs["mha"], tmp_path / "early", target="hf", update="4", dtype="bf16")
    assert {file.name for file in files} >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    first, last = list_checkpoints(shaped_runs["mha"] / "checkpoints")
    assert (first.update, last.update) == (4, 8)
    exported = load_file(tmp_path / "early" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(exported, load_weights(first)["embedding.weight"].bfloat16())
    assert "checkpoint after update 4" in (tmp_path / "early" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["mha", "stretched", "normalised"])
def test_a_gguf_reader_lists_every_tensor(name: str, shaped_runs, tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    assert main(["export", str(shaped_runs[name]), "--to", "gguf", "--out", str(tmp_path / "out")]) == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    run, weights = load(shaped_runs[name]), load_weights(list_checkpoints(shaped_runs[name] / "checkpoints")[-1])
    found = {tensor.name: tensor for tensor in reader.tensors}
    extra = {"rope_freqs.weight"} if name == "stretched" else set()
    assert len(found) == len(weights) + len(extra)
    assert extra <= found.keys()
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    # The reader gives shapes in the order of memory, the fastest first.
    assert list(found["token_embd.weight"].shape) == [run.run.model.dim, run.tokenizer.vocab_size]
    assert np.array_equal(found["blk.1.ffn_down.weight"].data, weights["blocks.1.ffn.down.weight"].numpy())
    assert ("output.weight" in found) == (not run.run.model.tie_embeddings)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    kind = "qwen3" if name == "normalised" else "llama"
    assert (keys["general.architecture"], keys[f"{kind}.context_length"]) == (kind, run.run.data.max_seq_len)
    assert keys[f"{kind}.rope.freq_base"] == run.run.model.rope_theta
    assert len(keys["tokenizer.ggml.tokens"]) == run.tokenizer.vocab_size
    assert keys["tokenizer.ggml.bos_token_id"] == keys["tokenizer.ggml.eos_token_id"] == run.tokenizer.eos_id


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_generates_the_same_tokens(name: str, shaped_runs, tmp_path: Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    export(shaped_runs[name], tmp_path / "out", target="gguf")
    ours = load(shaped_runs[name])
    length = ours.run.data.max_seq_len
    quiet = {"n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    theirs = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=length, **quiet)
    for text in texts(1000):
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ours.tokenizer.encode(text), repr(text)
    for text in texts(20):
        ids = [ours.tokenizer.eos_id, *ours.tokenizer.encode(text)][: length - 8]
        theirs.reset()
        theirs.eval(ids)
        for _ in range(8):
            logits = ours.logits(ids)[-1]
            best, second = logits.topk(2).values.tolist()
            token = int(np.argmax(theirs.scores[theirs.n_tokens - 1]))
            assert token == int(logits.argmax()) or best - second < 1e-4, repr(text)
            ids.append(token)
            theirs.eval([token])


def refusal(*words: object) -> str:
    """What `llama-lab export` is refused with."""
    with pytest.raises(ConfigError) as caught:
        export(*words, target="hf")  # type: ignore[arg-type]
    return str(caught.value)


def test_what_cannot_be_exported_is_refused(shaped_runs, folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "does not exist; name a run's folder" in refusal(tmp_path / "zzz", tmp_path / "out")
    assert "holds no run" in refusal(folders["mha"], tmp_path / "out")
    assert "holds files; name a folder that does not exist yet" in refusal(shaped_runs["mha"], folders["mha"])
    empty = shutil.copytree(shaped_runs["mha"], tmp_path / "empty", ignore=shutil.ignore_patterns("tokens-*"))
    assert "its checkpoints are gone" in refusal(empty, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--update 5 is no checkpoint of .*; there are 4, 8"):
        export(shaped_runs["mha"], tmp_path / "out", target="hf", update="5")
    broken = shutil.copytree(shaped_runs["mha"], tmp_path / "broken")
    for file in broken.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"x" + file.read_bytes()[1:])
    assert "no checkpoint of this run is whole" in refusal(broken, tmp_path / "out")
    assert main(["export", str(shaped_runs["mha"]), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "llama-lab export: --to 'onnx' is none of " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_its_package_gguf_is_refused(shaped_runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'llama_lab\[gguf\]'"):
        export(shaped_runs["mha"], tmp_path / "out", target="gguf")


def test_gguf_refuses_a_tokenizer_that_llama_cpp_has_no_words_for(shaped_runs, tmp_path: Path):
    pytest.importorskip("gguf")
    odd = shutil.copytree(shaped_runs["mha"], tmp_path / "odd")
    parsed = json.loads((odd / "tokenizer.json").read_text(encoding="utf-8"))
    parsed["normalizer"] = {"type": "Lowercase"}
    (odd / "tokenizer.json").write_text(json.dumps(parsed), encoding="utf-8")
    with pytest.raises(ConfigError, match="--to hf takes any"):
        export(odd, tmp_path / "out", target="gguf")
    assert not (tmp_path / "out").exists()
