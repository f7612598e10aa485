"""What the name of a metric tells: whether something is one, and which way is better."""

import re

HIGHER = (
    *(
        "accuracy",
        "acc",
        "f1",
        "bleu",
        "rouge",
        "auc",
        "auroc",
        "reward",
        "score",
        "em",
        "match",
        "recall",
        "precision",
        "throughput",
    ),
    *("mfu", "second", "wins", "r2"),
)
LOWER = ("loss", "losses", "perplexity", "ppl", "byte", "bpb", "nll", "entropy", "error", "err", "mse", "rmse", "mae", "wer", "cer")
# A config has columns of these names too, and a unit says nothing of what was measured.
AMBIGUOUS = ("precision", "second", "byte", "match", "entropy")


def is_higher_better(metric: str) -> bool | None:
    """Whether more of a metric is better, by the last word of its name that tells; None where none does."""
    for word in reversed(_words(metric)):
        if word in HIGHER:
            return True
        if word in LOWER:
            return False
    return None


def is_measured(name: str) -> bool:
    """Whether a name is that of something measured, by its last word: `train_loss`, but not `loss_weight`."""
    last = (_words(name) or [""])[-1]
    return last in {*HIGHER, *LOWER} - {*AMBIGUOUS}


def _words(name: str) -> list[str]:
    """The words of a name in lower case; `valLoss` has two."""
    return re.findall(r"[a-z]+\d*", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
