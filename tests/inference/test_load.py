"""A run as an object in Python: whatever is wrong with a call is a ConfigError that says so."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from llama_lab import ConfigError, compose, load, train
from llama_lab.inference.load import LoadedRun


@pytest.fixture(scope="module")
def loaded(run_folder) -> LoadedRun:
    return load(run_folder)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: run.generate("the", temperature=-1, top_k="a"), "temperature=-1 is below 0; 0 takes the most likely token"),
        (lambda run: run.generate("the", temperature=-1, top_k="a"), "top_k='a' is no whole number; try 50"),
        (lambda run: run.generate(5), "the prompt 5 is neither a text nor a list of ids; give one, or several in a list"),
        (lambda run: run.generate(["the", 5, None]), "the prompt None is neither a text nor a list of ids"),
        (lambda run: run.generate([1.5]), "the prompt [1.5] is neither a text nor a list of ids"),
        (lambda run: run.generate("the", batch="x"), "batch='x' is no whole number from 1 on"),
        (lambda run: run.generate("the", batch=0), "batch=0 is no whole number from 1 on"),
        (lambda run: run.complete(["the"], seeds=[1, 2]), "2 seeds are not one for each of 1 prompts"),
        (lambda run: run.stream(None), "the prompt None is neither a text nor a list of ids"),
        (lambda run: run.logits(["a"]), "ids=['a'] is no list of ids; give the numbers of tokens"),
        (lambda run: run.logits(5), "ids=5 is no list of ids; give the numbers of tokens"),
        (lambda run: run.logits([[[1]]]), "ids=[[[1]]] is no list of ids; give the numbers of tokens"),
        (lambda run: run.logits([[1], [2, 3]]), "lists of 1 and 2 ids cannot be read at once; give lists of one length"),
        (lambda run: run.logits([[1], [10**6]]), "id 1000000 at 0 is outside the vocabulary"),
    ],
)
def test_a_call_that_cannot_be_answered_says_why(loaded, call, said):
    with pytest.raises(ConfigError) as caught:
        call(loaded)
    assert said in str(caught.value)


def test_ids_may_come_in_any_shape_and_several_at_once(loaded):
    one = loaded.generate([104, 105], max_new_tokens=4, temperature=0)
    assert loaded.generate(np.array([104, 105]), max_new_tokens=4, temperature=0) == one
    assert loaded.generate([[104, 105], "the"], max_new_tokens=4, temperature=0)[0] == one
    assert loaded.generate([]) == []


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_logits_of_several_lists_are_those_of_each(loaded, kind):
    rows = [[104, 105, 32], [116, 104, 101]]
    both = loaded.logits(kind(rows))
    assert both.shape == (2, 3, loaded.tokenizer.vocab_size)
    for row, logits in zip(rows, both, strict=True):
        torch.testing.assert_close(loaded.logits(kind(row)), logits)


def test_a_loaded_run_says_what_it_is(loaded, run_folder):
    assert repr(loaded) == f"<LoadedRun {run_folder} after {loaded.update} updates>"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"update": "x"}, "update=x is no update; there are 4, 8, or last, or best"),
        ({"update": -1}, "update=-1 is no update; there are 4, 8, or last, or best"),
        ({"device": "gpu"}, "device=gpu is no device; there are cpu, cuda, mps and auto"),
        ({"device": "cuda:99"}, "device=cuda:99 is not there; device=cpu works on every machine"),
        ({"precision": ["fp32"]}, "precision=['fp32'] is neither fp32 nor bf16"),
        ({"run_folder": 5}, "run_folder=5 is no path; name a run's folder, outputs/<name>/<run id>"),
    ],
)
def test_a_run_that_cannot_be_opened_as_asked_says_why(run_folder, given, said):
    with pytest.raises(ConfigError) as caught:
        load(**{"run_folder": run_folder} | given)
    assert said in str(caught.value)


def test_composing_and_training_need_a_list_and_a_run():
    for call, said in (
        (lambda: compose("model.dim=64"), "overrides='model.dim=64' is no list of texts; try ['training_tokens=200_000']"),
        (lambda: compose([5]), "overrides=[5] is no list of texts; try ['training_tokens=200_000']"),
        (lambda: train("seed=1"), "run='seed=1' is no run; llama_lab.compose([...]) makes one"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == f"1 problem in this call\n  {said}"


def test_options_of_ones_own_are_found_by_a_folder_of_any_kind(tmp_path):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "own.yaml").write_text("defaults: [adamw, _self_]\nmax_lr: 0.125\n", encoding="utf-8")
    for folder in (tmp_path, str(tmp_path)):
        assert compose(["optim=own"], config_dir=folder).optim.max_lr == 0.125
    with pytest.raises(ConfigError, match="config_dir='nosuch' is no folder with groups of options in it"):
        compose(["optim=own"], config_dir="nosuch")


def test_values_that_were_changed_after_composing_are_checked(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_LAB_OUTPUTS", str(tmp_path))
    run = compose(["experiment=smoke"])
    run.optim.max_lr = -3
    with pytest.raises(ConfigError, match=r"optim\.max_lr=-3 is not above 0"):
        train(run)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_no_run_but_part_of_one(run_folder):
    folder = max(run_folder.glob("checkpoints/*"))
    with pytest.raises(ConfigError, match=r"is one checkpoint of the run .*; name that, and which of its updates"):
        load(folder)


def test_what_the_package_offers_is_listed_before_it_is_imported():
    program = "import llama_lab; assert {*llama_lab.__all__} <= {*dir(llama_lab)}; print(*dir(llama_lab))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["generate", "nosuch", "x"], ["evaluate", "nosuch"]])
def test_a_folder_that_is_not_there_is_said_before_torch_is_imported(command):
    program = (
        "import sys\nfrom llama_lab.cli import main\ncode = main(sys.argv[1:])\nassert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, timeout=170)
    instead = "name a run's folder, outputs/<name>/<run id>"
    said = f"ConfigError: 1 problem in this request\n  nosuch does not exist; {instead}\n"
    assert (done.returncode, done.stderr) == (2, said)
