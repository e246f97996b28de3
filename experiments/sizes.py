"""Defines the model sizes of `scaling`: the transformer, the text, and the ordered runs of each size."""

from typing import Any, NamedTuple

from .scaling_plan import Stage
from .text import PACKAGES


class Size(NamedTuple):
    """The settings that all runs of a size share, the length of its long dense runs, and its first learning rate."""

    settings: dict[str, Any]
    steps: int
    learning_rate: float
    stages: tuple[Stage, ...]
    packages: tuple[str, ...] = ()  # read in addition to the standard library


# The most informative runs come first. If you stop early, you have the main comparison and one run of each other model.
# The dense model is swept at the mixtures' length first, so that all seeds can start, and later at its own length.
SMALL = (
    Stage("dense", 1, rates=1),
    Stage("moe32", 0.24, rates=3),
    Stage("moe32", 0.16, rates=1),
    Stage("dense", 0.16, rates=1),
    Stage("moe128", 0.24, rates=1),
    Stage("moe8", 0.24, rates=1),
    Stage("dense", 0.24, rates=3),
    Stage("moe32", 0.32),
    Stage("moe32", 0.24, seeds=(1, 2)),
    Stage("dense", 1, seeds=(1, 2)),
    Stage("moe128", 0.24, rates=3),
    Stage("dense", 1, rates=3),
    Stage("moe8", 0.24, rates=3),
    Stage("moe8", 0.48),
    Stage("moe128", 0.16),
    Stage("moe32", 0.32, seeds=(0, 1, 2)),
    Stage("moe32", 0.24, rates=4),
    Stage("dense", 1, rates=4),
    Stage("moe128", 0.24, seeds=(1, 2)),
    Stage("moe128", 0.16, seeds=(1, 2)),
    Stage("moe32", 0.16, seeds=(1, 2)),
    Stage("moe128", 0.24, rates=4),
    Stage("moe8", 0.24, rates=4),
    Stage("moe8", 0.24, seeds=(1, 2)),
    Stage("moe8", 0.48, seeds=(1, 2)),
    Stage("dense", 0.5),
    Stage("upcycled", 0.24, rates=3),
    Stage("upcycled", 0.48),
    *(  # gains in shorter runs: see regime.py
        Stage(model, share, seeds=(seed,))
        for seed in (0, 1, 2)
        for model, share in (
            *(("dense", 0.06), ("moe32", 0.03), ("moe32", 0.06)),
            *(("dense", 0.12), ("moe32", 0.12), ("dense", 0.24)),
        )
    ),
    Stage("moe128", 0.32, seeds=(0, 1, 2)),
    Stage("moe8", 0.16, seeds=(0, 1, 2)),
    Stage("wide", 0.24, rates=4),
    Stage("dense", 0.5, seeds=(1, 2)),
    Stage("upcycled", 0.24, seeds=(1, 2)),
    Stage("upcycled", 0.48, seeds=(1, 2)),
    Stage("moe32", 1),
    Stage("moe128", 1),
    Stage("moe8", 1),
    Stage("wide", 1, rates=3),
)

# For the larger sizes, the text is long enough that no run sees a byte twice. Rates are swept in runs of an eighth of
# the dense model's length. If time allows, they are swept again in longer runs, which then determine the rate.
FIRST_SWEEPS = (Stage("dense", 1 / 8, rates=3), Stage("moe32", 1 / 8, rates=3))
MEDIUM = (
    *FIRST_SWEEPS,
    Stage("dense", 1),
    Stage("moe32", 1 / 4, rates=3),
    Stage("dense", 1, rates=3),
    Stage("moe32", 1 / 2),
    Stage("moe8", 1 / 4, rates=3),
    Stage("moe32", 2 / 3),
    Stage("moe8", 1 / 2),
    *(
        Stage(model, share, seeds=(seed,))
        for seed in (1, 2)
        for model, share in (("dense", 1), ("moe32", 1 / 2), ("moe32", 2 / 3), ("moe8", 1 / 2))
    ),
    Stage("dense", 1 / 2),  # gains in shorter runs
    Stage("moe8", 2 / 3, seeds=(0, 1, 2)),
    Stage("dense", 1 / 2, seeds=(1, 2)),
    Stage("moe32", 1 / 4, seeds=(1, 2)),
    Stage("moe8", 1 / 4, seeds=(1, 2)),
    Stage("moe32", 1 / 2, rates=3),
    Stage("moe8", 1 / 2, rates=3),
)
LARGE = (
    *FIRST_SWEEPS,
    Stage("dense", 1),
    Stage("moe32", 3 / 4),
    Stage("moe32", 1 / 2),
    Stage("dense", 1, rates=3),
    Stage("moe32", 1 / 2, rates=3),
    Stage("moe8", 1 / 2, rates=3),
    Stage("moe8", 3 / 4),
    *(
        Stage(model, share, seeds=(seed,))
        for seed in (1, 2)
        for model, share in (("dense", 1), ("moe32", 3 / 4), ("moe8", 3 / 4), ("moe32", 1 / 2), ("moe8", 1 / 2))
    ),
)

# The keys are active parameters, in millions.
SIZES = {
    "0.07m": Size(dict(dim=32, layers=3, heads=2, eval_every=250, checkpoint_every=250), 12_500, 0.01, SMALL),
    "0.3m": Size(dict(dim=64, layers=4, heads=4, eval_every=250, checkpoint_every=50), 6_000, 0.005, MEDIUM, PACKAGES),
    "1m": Size(dict(dim=128, layers=4, heads=4, eval_every=250, checkpoint_every=50), 8_000, 0.0025, LARGE, PACKAGES),
}
