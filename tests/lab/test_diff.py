"""What differs between two runs; and that what a run keeps of command and patch holds no secret."""

from pathlib import Path

import pytest

from llama_lab.cli import main
from llama_lab.lab.compare.diff import code_changes, differences
from llama_lab.lab.compare.records import load_record
from llama_lab.training.run_folder import describe_origin
from llama_lab.training.scrub import PATCH_CHARACTERS, REMOVED, scrub, scrub_command, scrub_patch

from .written_runs import META, Make

Output = pytest.CaptureFixture[str]
PATCH = """diff --git a/llama_lab/training/loop.py b/llama_lab/training/loop.py
--- a/llama_lab/training/loop.py
+++ b/llama_lab/training/loop.py
@@ -1 +1 @@
-old = 1
+old = 2
"""


def test_equal_runs_differ_in_nothing_that_moves_the_curve(make: Make, capsys: Output):
    a, b = make(0), make(0, name="other", machine={"processes": 1, "host": "there"})
    assert [one.what for one in differences(load_record(a), load_record(b)) if one.matters] == []
    assert main(["diff", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "Nothing that differs can move the loss curve. 2 more cannot move it: name, host; --all shows them" in out
    assert main(["diff", str(a), str(b), "--all"]) == 0
    assert "there" in capsys.readouterr().out


def test_everything_that_moves_the_curve_is_named(make: Make, capsys: Output):
    machine = {"processes": 4, "host": "here", "device": "cuda"}
    code = {"sha256": "beef", "commit": "1" * 40, "diff": PATCH}
    b = make(1, lr=2e-3, code=code, machine=machine, versions={"torch": "3"}, data={"data": "e", "tokenizer": "t"}, validation=None)
    found = {one.what: (one.part, one.a, one.b) for one in differences(load_record(make(0)), load_record(b)) if one.matters}
    assert found == {
        "seed.init": ("config", "0", "1"),
        "seed.data": ("config", "0", "1"),
        "optim.max_lr": ("config", "0.001", "0.002"),
        "sources": ("code", "c0de", "beef"),
        "commit": ("code", "-", "111111111111"),
        "uncommitted files": ("code", "none", "llama_lab/training/loop.py"),
        "training tokens and tokenizer": ("data", "d", "e"),
        "windows from update 1 on": ("fed", "0000000000000001", "0000000100000001"),
        "torch": ("environment", "2", "3"),
        "device": ("environment", "-", "cuda"),
        "processes": ("environment", "1", "4"),
    }
    assert main(["diff", str(make(0, name="c")), str(b)]) == 0
    out = capsys.readouterr().out
    assert "+old = 2" in out and "11 differences can move the loss curve." in out
    assert out.startswith("A: ") and "\nB: " in out


def test_the_code_between_two_commits_is_bounded_and_does_without_git(make: Make):
    long = PATCH + "".join(f"+line {number}\n" for number in range(2000))
    a, b = (
        make(0, code={"sha256": "a", "commit": "0" * 40, "diff": ""}),
        make(0, lr=2e-3, code={"sha256": "b", "commit": "1" * 40, "diff": long}),
    )
    lines = code_changes(load_record(a), load_record(b))
    assert lines[0] == "(this checkout does not have both commits)"
    assert lines[-1].endswith("more lines; meta.json has them)") and len(lines) < 410


def test_what_is_no_pair_of_runs_is_refused(make: Make, tmp_path: Path, capsys: Output):
    a = make(0)
    for other, rule in ((tmp_path, "holds no run"), (tmp_path / "x", "does not exist"), (a, "is the same folder")):
        assert main(["diff", str(a), str(other)]) == 2
        assert rule in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567",
        'os.environ["HF_TOKEN"] = "abcdefgh123"',
        "password: hunter22!",
        '{"client_secret": "s3cr3tvalue"}',
        "Authorization: Bearer abcdefghijkl",
        "https://me:s3cr3t@example.org/data",
        "https://ghp_abcdefghijklmnop@example.org",
        "key sk-abcdefghijklmnopqrst",
        "AKIAABCDEFGHIJKLMNOP",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
        "token=abcdefgh",
        "--hf-token abcdefgh",
        "data.path=https://example.org/text?access_token=abcdefgh&page=2",
        "wandb.group=password:hunter22",
    ],
)
def test_secrets_are_removed(text: str):
    clean = scrub(text)
    assert REMOVED in clean
    for secret in ("0123456789abcdef", "abcdefgh", "hunter22", "s3cr3t", "AKIA", "\nabc\n"):
        assert secret not in clean
    assert scrub(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "training_tokens=1843200 data.tokens_per_update=8192",
        "tokenizer=file tokenizer.path=shards/tokenizer.json",
        "+    token = tokenizer.encode(text)",
        "eos_token: Tensor = ids[0]",
        "sorted(items, key=lambda pair: pair[0])",
        "index 3fbd9c0..98cef9c 100644",
    ],
)
def test_what_is_no_secret_stays(text: str):
    assert scrub(text) == text


def test_what_a_run_keeps_is_scrubbed_and_bounded(untrained):
    secret = "hf_abcdefghijklmnopqrst"
    command = ["llama-lab", "train", f"data.path=https://u:{secret}@host/x", "--api-key", "plainvalue", "x" * 5000]
    origin = describe_origin(untrained, command=command, data={})
    assert set(META) <= set(origin)
    kept = origin["command"]
    assert secret not in str(kept) and "plainvalue" not in str(kept) and len(str(kept)) < 2000
    assert kept[:2] == ["llama-lab", "train"]
    assert len(scrub_command(["a"] * 5000)) == 501
    patch = "".join(f"+value_{number} = {number}\n" for number in range(20_000)) + f"+token = '{secret}'\n"
    bounded = scrub_patch(patch)
    assert len(bounded) < PATCH_CHARACTERS + 100 and "characters left out" in bounded.splitlines()[-1]
    assert secret not in scrub_patch(f"+token = '{secret}'\n")
