"""Colours of pictures of routing; colour-blind readers can tell them apart, also in print.

Loads run from purple (too little) over white (balanced) to orange (too much). Experts have the palette of Okabe and
Ito. Matplotlib, the extra `plot`, is imported only where something is drawn.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

LEAST, MOST = 1 / 4, 4.0  # relative loads at the ends of the colours
TICKS: dict[float, str] = {1 / 4: "¼ or less", 1 / 2: "½", 1: "balanced", 2: "2×", 4: "4× or more"}

PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#4d4d4d")
OTHERS = "#cfcfcf"  # experts beyond the palette
INK, FAINT, STRIKE = "#1a1a1a", "#767676", "#b00020"


def clipped(load: Tensor) -> Tensor:
    return load.clamp(LEAST, MOST)


def load_colours() -> dict[str, Any]:
    """The colours of loads: white is balanced, half and double are equally far from it."""
    from matplotlib.colors import LogNorm

    return {"cmap": "PuOr_r", "norm": LogNorm(LEAST, MOST)}


def ink_on(colour: str) -> str:
    """Black or white, whichever has more contrast with a colour."""
    from matplotlib.colors import to_rgb

    luminance = sum(share * part**2.2 for share, part in zip((0.21, 0.72, 0.07), to_rgb(colour), strict=True))
    return "white" if luminance < 0.18 else INK


def need_matplotlib() -> None:
    """Raise ImportError, with the remedy, if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install matplotlib, or install mixture_of_experts with its extra 'plot'"
        ) from error
