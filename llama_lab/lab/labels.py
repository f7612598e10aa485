"""What tells configs apart, in a few words for each of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llama_lab.config.schema import shown

MOST_VALUES = 3


def differences_of(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between configs, for each of them: `max_lr=0.01 init=2`; empty where nothing does.

    Args:
        configs: value by key path, the kind of a part under the part's name. Kinds are named first, then what does not follow from
            them; of many keys the first.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if len({shown(config.get(key, "-")) for config in configs}) > 1]
    # Where the kind of a part differs, its fields differ with it; the kind says it all, but for fields that both kinds have.
    everywhere = [key for key in differing if all(key in config for config in configs)]
    kinds = {key for key in everywhere if "." not in key and any(other.startswith(f"{key}.") for other in keys)}
    named = [key for key in everywhere or differing if not _follows(key, key.partition(".")[0], kinds, configs)]
    named.sort(key=lambda key: key not in kinds)
    short = short_keys(named)
    words = {key: short[key] for key in named[:MOST_VALUES]}
    more = f" (and {len(named) - MOST_VALUES} more)" if len(named) > MOST_VALUES else ""
    return [" ".join(f"{word}={shown(config.get(key, '-'))}" for key, word in words.items()) + more for config in configs]


def _follows(key: str, part: str, kinds: set[str], configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a field of a part is the same wherever the part is of the same kind."""
    if part not in kinds or key == part:
        return False
    pairs = {(shown(config[part]), shown(config.get(key, "-"))) for config in configs}
    return len(pairs) == len({kind for kind, _ in pairs})


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Of each key path its last part, where that says which it is."""
    count = Counter(key.rpartition(".")[2] for key in keys)
    return {key: last if count[last := key.rpartition(".")[2]] == 1 else key for key in keys}
