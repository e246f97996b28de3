"""What produced the figures of `docs/experiments.md`: one command each, `python -m experiments.NAME`, from the root.

Models, text and training are those of `language_model/`. Records of finished runs are in `records/`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # where `checkpoints` is
