"""Text without its secrets, for what a run keeps of a command and of a patch.

Whatever is named like a secret or has the shape of one becomes `[removed]`; in doubt it goes. Names of our own fields
(`training_tokens`, `tokenizer.path`) are none, although "token" is in them.
"""

import re
from collections.abc import Sequence

REMOVED = "[removed]"
WORD_CHARACTERS = 1_000
COMMAND_WORDS = 500
PATCH_CHARACTERS = 100_000

_SECRET_PARTS = {
    "password",
    "passwd",
    "pwd",
    "passphrase",
    "secret",
    "secrets",
    "credential",
    "credentials",
    "auth",
    "authorization",
}
_SECRET_PARTS |= {"apikey", "accesskey", "privatekey", "authtoken", "accesstoken"}
_KEY_PARTS = {"api", "access", "private", "secret", "wandb", "aws", "openai", "signing", "encryption", "account"}
# name=value, name: value, "name": "value", --name value
_NAMED = re.compile(
    r"""(?P<name>[A-Za-z][A-Za-z0-9_.-]*)(?P<between>["']?\]?\s*[=:]\s*|["']?\s+)(?P<quote>["']?)(?P<value>[^\s"',;]{4,})"""
)
_SHAPES = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"\b(?:hf_|sk-|sk_live_|rk_live_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AIza|npm_|pypi-)[A-Za-z0-9_-]{12,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    re.compile(r"(?<![0-9a-fA-F])[0-9a-f]{40}(?![0-9a-fA-F])"),  # a key of W&B
    re.compile(r"(?<=://)[^\s/@'\"]+(?=@)"),  # who logs in, in an address
    re.compile(r"(?i)(?<=\bbearer )[A-Za-z0-9._~+/=-]{8,}"),
)


def scrub(text: str) -> str:
    """The text with its secrets removed; applied twice it changes nothing more."""
    for shape in _SHAPES:
        text = shape.sub(REMOVED, text)
    return _NAMED.sub(_without_value, text)


def scrub_command(words: Sequence[str]) -> list[str]:
    """What was typed, without secrets and of bounded size."""
    kept: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        flag = before.lstrip("-") if before.startswith("-") and "=" not in before else ""
        clean = REMOVED if flag and _is_secret(flag) else scrub(word)
        kept.append(clean if len(clean) <= WORD_CHARACTERS else f"{clean[:WORD_CHARACTERS]}… ({len(clean)} characters)")
    if len(kept) > COMMAND_WORDS:
        kept = [*kept[:COMMAND_WORDS], f"… ({len(kept) - COMMAND_WORDS} more words)"]
    return kept


def scrub_patch(text: str) -> str:
    """A patch without secrets and of bounded size; what is left out is said in its last line."""
    if len(text) <= PATCH_CHARACTERS:
        return scrub(text)
    # At the end of a line, so that no secret is cut into something that looks like none.
    end = text.rfind("\n", 0, PATCH_CHARACTERS) + 1
    return f"{scrub(text[:end])}… ({len(text) - end} of {len(text)} characters left out)\n"


def _without_value(found: re.Match[str]) -> str:
    name, between, quote, value = found["name"], found["between"], found["quote"], found["value"]
    typed = "=" in between or ":" in between
    flag = found.string[max(0, found.start() - 2) : found.start()].endswith("-") and between.isspace()
    if not (typed or flag) or not _is_secret(name) or value.startswith(REMOVED) or _is_code(name, between, quote, value):
        # A value may name one in turn, as an address does behind its question mark.
        return f"{name}{between}{quote}{_NAMED.sub(_without_value, value)}"
    return f"{name}{between}{quote}{REMOVED}"


def _is_secret(name: str) -> bool:
    parts = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().replace("-", "_").replace(".", "_").split("_")
    return bool(_SECRET_PARTS & set(parts)) or parts[-1] == "token" or ("key" in parts and bool(_KEY_PARTS & set(parts)))


def _is_code(name: str, between: str, quote: str, value: str) -> bool:
    """Whether a value is a number or an expression, as in `token = ids[0]`."""
    if value.replace("_", "").replace(".", "").isdigit() or value in ("None", "True", "False", "null", "true", "false"):
        return True
    if quote or not between.startswith((" =", ": ", " :")):
        return False
    return bool(re.search(r"[(\[{]", value)) or (name.lower().endswith("token") and value.replace(".", "_").isidentifier())
