"""A run as an object in Python: whatever is wrong with a call is a ConfigError that says so."""

import subprocess
import sys

import numpy as np
import pytest

from llama_lab import compose, load, train
from llama_lab.config.errors import ConfigError
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


@pytest.mark.parametrize("command", [["generate", "nosuch", "x"], ["evaluate", "nosuch"]])
def test_a_folder_that_is_not_there_is_said_before_torch_is_imported(command):
    program = (
        "import sys\nfrom llama_lab.cli import main\ncode = main(sys.argv[1:])\nassert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, timeout=170)
    instead = "name a run's folder, outputs/<name>/<run id>"
    said = f"ConfigError: 1 problem in this request\n  nosuch does not exist; {instead}\n"
    assert (done.returncode, done.stderr) == (2, said)
