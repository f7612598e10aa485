"""Which runs of two arms stand against each other, and which of them are independent.

What a seed of the weights does to the difference between two arms, it does to every pair that has it; likewise a seed of the order
of the data. So two pairs that share one of both are less than two. Where every one of some seeds of weights meets every one of some
orders, all pairs count, with an error that holds what they share. Else only pairs that share nothing do. A seed that all pairs have
in common tells none of them from another: the answer is then about that seed alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_lab.lab.compare.arms import Arm
from llama_lab.lab.compare.records import RunRecord

Seeds = tuple[int, ...]


@dataclass(frozen=True)
class Pairing:
    """The runs of two arms that are compared.

    Attributes:
        ours, theirs: of the baseline and of the arm.
        paired: whether run i of one belongs to run i of the other.
        crossed: seeds of weights and of data whose every combination is a pair, in this order; null where no two pairs share one.
        alone: runs without a partner of the same seeds.
        sharing: runs left out since they share one seed with a run that counts.
    """

    ours: tuple[RunRecord, ...]
    theirs: tuple[RunRecord, ...]
    paired: bool
    crossed: tuple[int, int] | None = None
    alone: tuple[RunRecord, ...] = ()
    sharing: tuple[RunRecord, ...] = ()


def pair_runs(baseline: Arm, arm: Arm, *, paired: bool | None) -> Pairing:
    """The runs of two arms that are compared, and how they belong together.

    Args:
        paired: null: pairs are made where at least two seeds, and half of the larger arm's, are common to both.
    """
    ours, theirs = ({run.seed: run for run in one.runs if run.seed} for one in (baseline, arm))
    common = sorted(ours.keys() & theirs.keys())
    enough = len(common) >= 2 and 2 * len(common) >= max(len(baseline.runs), len(arm.runs))
    if paired is False or not common or (paired is None and not enough):
        kept = [_independent_runs(one.runs) for one in (baseline, arm)]
        sharing = tuple(run for one, runs in zip((baseline, arm), kept, strict=True) for run in one.runs if run not in runs)
        return Pairing(kept[0], kept[1], paired=False, sharing=sharing)
    chosen, crossed = choose_seeds(common)
    return Pairing(
        ours=tuple(ours[seeds] for seeds in chosen),
        theirs=tuple(theirs[seeds] for seeds in chosen),
        paired=True,
        crossed=crossed,
        alone=tuple(run for run in (*baseline.runs, *arm.runs) if run.seed not in common),
        sharing=tuple(run for run in (*baseline.runs, *arm.runs) if run.seed in common and run.seed not in chosen),
    )


def choose_seeds(seeds: Sequence[Seeds]) -> tuple[list[Seeds], tuple[int, int] | None]:
    """The seeds whose runs count, of those that there are, and how many of weights and of data are crossed in them.

    Args:
        seeds: no two the same.
    """
    apart = _apart(seeds)
    if len(apart) == len(seeds):
        return sorted(seeds), None
    whole = _whole_grid(seeds)
    crossed = tuple(len({one[part] for one in whole}) for part in (0, 1)) if whole else (0, 0)
    if min(crossed) >= len(apart):
        return whole, (crossed[0], crossed[1])
    return apart, None


def _independent_runs(runs: Sequence[RunRecord]) -> tuple[RunRecord, ...]:
    chosen = _apart([run.seed for run in runs if run.seed])
    return tuple(run for run in runs if not run.seed or run.seed in chosen)


def _apart(seeds: Sequence[Seeds]) -> list[Seeds]:
    """As many as can be found no two of which share a seed; one that all have does not count."""
    varied = [part for part in range(min(map(len, seeds), default=0)) if len({one[part] for one in seeds}) > 1]
    if len(varied) < 2:
        return sorted(seeds)

    def share(one: Seeds, other: Seeds) -> bool:
        return one != other and any(one[part] == other[part] for part in varied)

    left, chosen = sorted(seeds), list[Seeds]()
    while left:
        # Whoever shares with the fewest goes first; among those, who has one number for everything.
        best = min(left, key=lambda one: (sum(share(one, other) for other in left), len(set(one)), one))
        chosen.append(best)
        left = [one for one in left if one != best and not share(one, best)]
    return sorted(chosen)


def _whole_grid(seeds: Sequence[Seeds]) -> list[Seeds]:
    """Seeds of two kinds each of which meets each of the other: those of one kind that all of the other meet. Empty if none."""
    if any(len(one) != 2 for one in seeds):
        return []
    grids: list[list[Seeds]] = []
    for kind in (0, 1):
        met = {value: {one[1 - kind] for one in seeds if one[kind] == value} for value in {one[kind] for one in seeds}}
        everyone = {one[1 - kind] for one in seeds}
        grids.append(sorted(one for one in seeds if met[one[kind]] == everyone))
    return max(grids, key=len)
