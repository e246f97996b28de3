"""The recipe for checkpoints of the examples, to which the documentation leads."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from checkpoints import list_checkpoints, load_checkpoint, save_checkpoint  # noqa: E402

FILE = EXAMPLES / "checkpoints.py"
__all__ = ["FILE", "list_checkpoints", "load_checkpoint", "save_checkpoint"]
