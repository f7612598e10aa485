"""What looks at a model while it trains: it changes nothing that training depends on, costs little, and writes what it saw."""

import gc
import json
from pathlib import Path

import pytest
import torch

from llama_lab import compose, train
from llama_lab.config.errors import ConfigError
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.inference.beginnings import beginnings
from llama_lab.inference.few_shot import shipped
from llama_lab.inference.generate import generate
from llama_lab.inference.observers import sample
from llama_lab.inference.options import Sampling
from llama_lab.training.metrics import read_rows
from llama_lab.training.saving.checkpoint import load_weights
from llama_lab.training.saving.manifest import list_checkpoints

from .conftest import small_model, tiny_overrides

WATCHED = "sample.first_tokens=256 sample.growth=1 sample.new_tokens=6 eval.every_updates=1 eval.tasks_every_updates=4"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    row = {"goal": "the model", "sol1": "reads text", "sol2": "never", "label": 1}
    path = tmp_path / "piqa_like.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_samples_and_scores_leave_the_curve_as_it_is_and_are_written_down(text_file, run_folder, task):
    words = [word for word in tiny_overrides(text_file) if word not in ("sample=null", "eval.every_updates=4")]
    folder = train(compose([*words, *WATCHED.split(), f"eval.tasks=[{task}]"])).folder
    plain, watched = (load_weights(list_checkpoints(path / "checkpoints")[-1]) for path in (run_folder, folder))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    losses = [
        [row["train/loss"] for row in read_rows(path / "metrics.jsonl") if "train/loss" in row] for path in (run_folder, folder)
    ]
    assert losses[0] == losses[1] != []

    rows = read_rows(folder / "samples.jsonl")
    assert [row["update"] for row in rows] == [update for update in range(1, 9) for _ in range(4)]
    drawn = [row["set"] for row in rows if row["set"] is not None]
    assert len(drawn) == 8 and len(set(drawn)) > 2 and set(drawn) <= set(shipped())
    scores = [row for row in read_rows(folder / "metrics.jsonl") if "task/piqa_like/accuracy" in row]
    assert [row["update"] for row in scores] == [4, 8]
    assert all(row["task/piqa_like/accuracy_norm"] in (0.0, 1.0) for row in scores)
    assert json.loads((folder / "summary.json").read_text())["task/piqa_like/accuracy"] in (0.0, 1.0)


def test_files_that_are_not_there_end_a_run_before_it_begins(text_file, tmp_path, outputs):
    words = [word for word in tiny_overrides(text_file) if word != "sample=null"]
    run = compose([*words, "sample.prompt_sets=[speling,sentiment]", f"eval.tasks=[{tmp_path / 'gone.jsonl'}]"])
    with pytest.raises(ConfigError) as caught:
        train(run)
    assert [subject for subject, _ in caught.value.problems] == ["sample.prompt_sets: speling", str(tmp_path / "gone.jsonl")]
    assert not outputs.exists()


def test_samples_depend_on_weights_and_seed_alone(text_file):
    model = small_model(5, context=200, vocabulary=257)
    node = compose(["sample.new_tokens=5", "sample.prompts=[a,b]"]).sample
    prepared = prepared_from(text_file)
    assert node is not None
    state = torch.random.get_rng_state()
    first, again, other = (sample(model, prepared, node, seed, lambda: False) for seed in (1, 1, 2))
    assert first == again != other
    assert [one.set for one in first[:2]] == [None, None] and first[2].set in shipped()
    assert first[0].text != first[1].text
    assert model.training and torch.equal(torch.random.get_rng_state(), state)


def prepared_from(*texts: Path) -> PreparedData:
    if len(texts) == 1:
        words = ["data=text", f"data.path={texts[0]}"]
    else:
        folders = [prepared_from(text).folder for text in texts]
        words = ["data=mixture", f"data.paths=[{','.join(map(str, folders))}]", f"data.weights=[{','.join('1' * len(texts))}]"]
    run = compose(["tokenizer=bytes", *words])
    return prepare(run.data, run.tokenizer, print)


@pytest.mark.parametrize(
    ("document", "prompt"),
    [
        ("Es war einmal ein König, der hatte eine Tochter.", "Es war einmal ein König,"),
        ("  \n\nKapitel 1\n\nIn der Straßenbahn saß sie.", "Kapitel 1\n\nIn der"),
        ("今天天气很好，我们去公园散步吧。", "今天天气很好，我们去公"),
        ("Donaudampfschifffahrtsgesellschaft", "Donaudampfschifffahr"),
        ("ü" * 200, "ü" * 24),
    ],
)
def test_without_prompts_held_out_documents_are_continued(tmp_path: Path, document: str, prompt: str):
    text = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": words}) for number in range(60) for words in ("x", "\n", f"{document} ({number:03d})")]
    text.write_text("\n".join(lines), encoding="utf-8")
    assert beginnings(prepared_from(text)) == [prompt]


def test_without_documents_paragraphs_are_continued(tmp_path: Path):
    for end, name in (("\n\n", "paragraphs"), ("\n", "lines"), (". ", "sentences"), (" ", "words")):
        text = tmp_path / f"{name}.txt"
        text.write_text(end.join(f"Absatz{number}-und-noch-etwas-mehr" for number in range(2000)), encoding="utf-8")
        found = beginnings(prepared_from(text))
        assert len(found) == 3 and all(prompt.startswith("Absatz1") for prompt in found), found
    text.write_text("x" * 10_000, encoding="utf-8")
    assert beginnings(prepared_from(text)) == ["x" * 24]


def test_prompts_are_of_each_source_in_turn(tmp_path: Path):
    texts = []
    for name in ("eins", "zwei"):
        texts.append(tmp_path / f"{name}.jsonl")
        lines = [json.dumps({"text": f"{name} {number:03d} und noch etwas mehr als das"}) for number in range(600)]
        texts[-1].write_text("\n".join(lines), encoding="utf-8")
    found = beginnings(prepared_from(*texts))
    assert [prompt[:4] for prompt in found] == ["eins", "zwei", "eins"]
    assert len(set(found)) == 3


def test_memory_does_not_grow_with_the_samples():
    """Of tensors that are left behind there are none, however many samples were drawn."""
    model = small_model(5, context=64, vocabulary=257)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    generate(model, [[1]] * 3, new_tokens=5, sampling=Sampling())
    before = tensors()
    for seed in range(20):
        generate(model, [[seed]] * 3, new_tokens=5, sampling=Sampling())
    assert tensors() == before
