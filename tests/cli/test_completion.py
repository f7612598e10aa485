"""TAB, answered to a real bash."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llama_lab.commands import COMMANDS
from llama_lab.completion import SCRIPTS, complete

BASH = shutil.which("bash")
COMMAND_WORDS = {name: command.words for name, command in COMMANDS.items()}


def answers(line: str) -> list[str]:
    return complete(line, COMMAND_WORDS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llama-lab ", list(COMMANDS)),
        ("llama-lab tr", ["train", "track"]),
        ("llama-lab train mod", ["model.", "model="]),
        ("llama-lab train optim.max", ["optim.max_grad_norm=", "optim.max_lr="]),
        ("llama-lab train seed.init=0 schedule.cool", ["schedule.cooldown_fraction="]),
        ("llama-lab train data.window=", ["data.window=contiguous", "data.window=document", "data.window=packed"]),
        ("llama-lab train eval=", ["eval=null"]),
        ("llama-lab train --mul", ["--multirun"]),
        ("llama-lab cache ", ["list", "clean"]),
        ("llama-lab cache clean ", []),
        ("llama-lab cache clean --", ["--all", "--older-than", "--help"]),
        ("llama-lab bench optim.max_l", ["optim.max_lr="]),
        ("llama-lab bench --con", ["--config-dir"]),
        ("llama-lab noise --seeds 3 optim.max_l", ["optim.max_lr="]),
        ("llama-lab data ", ["inspect", "replay"]),
        ("llama-lab data inspect shar", []),
        ("llama-lab data inspect shards --ver", ["--verify"]),
        ("llama-lab completion z", ["zsh"]),
        ("llama-lab train data.path=", []),
        ("llama-lab train --help op", ["optim"]),
        ("llama-lab train --help optim.max", ["optim.max_lr", "optim.max_grad_norm"]),
        ("llama-lab train -h smo", ["smoke"]),
        ("llama-lab unknown x", []),
    ],
)
def test_answers(line: str, expected: list[str]):
    assert answers(line) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_the_flags_offered_are_those_that_help_explains(name: str, capsys: pytest.CaptureFixture[str]):
    with contextlib.suppress(SystemExit):
        COMMANDS[name].run(["--help"])
    explained = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out))
    assert explained | {"--help"} == {word for word in COMMAND_WORDS[name] if word.startswith("--")} | {"--help"}


def test_options_and_presets_come_from_the_folders(tmp_path: Path):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "mine.yaml").touch()
    assert {"optim=adamw", "optim=muon"} <= set(answers("llama-lab train optim="))
    assert "experiment=smoke" in answers("llama-lab train -m experiment=")
    assert answers(f"llama-lab train --config-dir {tmp_path} optim=mi") == ["optim=mine"]


def test_a_list_completes_its_last_value():
    assert answers("llama-lab train -m optim=adamw,mu") == ["optim=adamw,muon"]


@pytest.mark.skipif(BASH is None or os.name != "posix", reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("llama-lab trai", ["train "]),
        ("llama-lab train optim.max_l", ["optim.max_lr="]),
        # bash breaks words at =, so only what follows it is replaced
        ("llama-lab train optim=mu", ["muon "]),
        ("llama-lab train -m optim=adamw,mu", ["adamw,muon "]),
    ],
)
def test_bash_completes(typed: str, expected: list[str], tmp_path: Path):
    program = Path(sysconfig.get_path("scripts")) / "llama-lab"
    if not program.is_file():
        pytest.skip("llama_lab is not installed here")
    (tmp_path / "script").write_text(SCRIPTS["bash"], encoding="utf-8")
    ask = f"""
        source '{tmp_path}/script'
        complete -p llama-lab >&2
        COMP_LINE='{typed}'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=(llama-lab); COMP_CWORD=1
        _llama_lab
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(BASH), "--norc", "-c", ask], capture_output=True, text=True, env=environment, encoding="utf-8")
    assert "complete -o default -o nospace -F _llama_lab llama-lab" in done.stderr
    assert done.stdout.splitlines() == expected


@pytest.mark.skipif(BASH is None or sys.platform != "linux", reason="drives a terminal as Linux has it")
def test_a_person_pressing_tab_in_bash(tmp_path: Path):
    """An interactive bash on a pseudo-terminal: what is typed, TAB, Enter, is what runs."""
    import pty

    program = Path(sysconfig.get_path("scripts")) / "llama-lab"
    if not program.is_file():
        pytest.skip("llama_lab is not installed here")
    # Completion asks the real program; what is entered in the end is only written down.
    rc = f"""
        PS1='$ '; PATH='{program.parent}':$PATH
        {SCRIPTS["bash"]}
        llama-lab() {{
            if [[ $1 == __complete ]]; then command llama-lab "$@"; else printf '%s\\n' "$@" > '{tmp_path}/typed'; fi
        }}
    """
    (tmp_path / "rc").write_text(rc, encoding="utf-8")
    main_end, terminal = pty.openpty()
    shell = subprocess.Popen(
        [str(BASH), "--rcfile", str(tmp_path / "rc"), "-i"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        cwd=tmp_path,
    )
    os.close(terminal)
    os.write(main_end, b"llama-lab trai\toptim=mu\toptim.adamw_max_l\t0.01\nexit\n")
    try:
        while os.read(main_end, 4096):
            pass
    except OSError:
        pass  # the terminal's other end is gone: the shell has ended
    finally:
        shell.wait(timeout=30)
        os.close(main_end)
    assert (tmp_path / "typed").read_text(encoding="utf-8").split() == ["train", "optim=muon", "optim.adamw_max_lr=0.01"]
