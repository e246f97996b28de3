"""Programs that produce the figures in `docs/experiments.md`. Run `python -m experiments.NAME` from the root.

Models, text and training are in `language_model/`. Records of finished runs are in `records/`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # where `checkpoints` is
