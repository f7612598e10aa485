"""Completion of the command line: the scripts that shells load, and the answers they ask for at each TAB.

Hydra's own completion knows no commands before the overrides (`llama-lab train mod` would be a parse error), hence this one.

The scripts hand over the line up to the cursor. An answer is a whole word; one that ends in `=` or `.` waits for more, so no
space follows it.
"""

from pathlib import Path

from llama_lab import vocabulary
from llama_lab.field_help import topics

BASH = """\
# llama-lab completion for bash. To use it: eval "$(llama-lab completion bash)", for good in ~/.bashrc
_llama_lab() {
    local line="${COMP_LINE:0:COMP_POINT}" word cut="" answer
    word="${line##*[[:space:]]}"
    # bash replaces only what follows the last = or : of a word, where these break words
    if [[ $COMP_WORDBREAKS == *=* && $word == *=* ]]; then cut="${word%=*}="; fi
    COMPREPLY=()
    while IFS= read -r answer; do
        answer="${answer#"$cut"}"
        case $answer in *[=.]) ;; *) answer="$answer " ;; esac
        COMPREPLY+=("$answer")
    done < <("${COMP_WORDS[0]}" __complete "$line" 2>/dev/null)
}
complete -o default -o nospace -F _llama_lab llama-lab
"""

ZSH = """\
#compdef llama-lab
# llama-lab completion for zsh. To use it: eval "$(llama-lab completion zsh)" after compinit, for good in ~/.zshrc
_llama_lab() {
    local -a answers
    answers=(${(f)"$("${words[1]}" __complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
    (( $#answers )) || { _files; return }
    compadd -S '' -- ${(M)answers:#*[=.]}
    compadd -- ${answers:#*[=.]}
}
compdef _llama_lab llama-lab
"""

FISH = """\
# llama-lab completion for fish. To use it: llama-lab completion fish | source, for good in ~/.config/fish/config.fish
complete -c llama-lab -a '(llama-lab __complete (commandline -cp | string collect) 2>/dev/null)'
"""

TAKES_OVERRIDES = ("train", "plan", "fork", "import", "prepare", "bench", "noise")
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def complete(line: str, commands: dict[str, list[str]]) -> list[str]:
    """The words that the last word of `line` can become.

    Args:
        line: the command line up to the cursor, its program's name included.
        commands: command -> its flags and fixed words.
    """
    words = line.split()[1:]
    current = words.pop() if words and not line[-1].isspace() else ""
    if not words:
        return _starting_with(current, list(commands))
    command = words[0]
    if command == "train" and {"-h", "--help"} & set(words) and not current.startswith("-"):
        return _starting_with(current, topics(_config_dir(words), fields="." in current))
    if command in TAKES_OVERRIDES and not current.startswith("-"):
        found = _override(current, _config_dir(words))
        # Of a config, preparing reads two nodes.
        return found if command != "prepare" else [word for word in found if word.startswith(("data", "tokenizer", "experiment="))]
    known = commands.get(command, [])
    if any(word in known for word in words[1:]) and not current.startswith("-"):
        return []  # a path or a name follows, which the shell knows better
    return _starting_with(current, [word for word in known if word.startswith("-") == current.startswith("-")])


def _override(current: str, extra: Path | None) -> list[str]:
    fields = vocabulary.fields()
    groups = vocabulary.groups(extra) | {"experiment": sorted(vocabulary.presets(extra))}
    if "=" not in current:
        depth = current.count(".")
        keys = [f"{group}=" for group in groups] if depth == 0 else []
        for path, field in fields.items():
            if path.count(".") == depth:
                keys += [f"{path}."] if field.is_node else []
                keys += [f"{path}="] if not field.is_node or field.choices else []
        return _starting_with(current, sorted(set(keys)))
    key, _, values = current.partition("=")
    # In a list of a sweep (`model=a,b`) the last value is the one being typed.
    before, comma, value = values.rpartition(",")
    choices = groups.get(key) or (fields[key].choices if key in fields else ())
    return [f"{key}={before}{comma}{choice}" for choice in choices if choice.startswith(value)]


def _starting_with(current: str, words: list[str]) -> list[str]:
    return [word for word in words if word.startswith(current)]


def _config_dir(words: list[str]) -> Path | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        if flag == "--config-dir":
            return Path(value or following)
    return None
