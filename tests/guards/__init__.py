"""Guards of a rebuilding: what must stay equal between this tree and an earlier commit, side by side.

    python -m tests.guards                          # all, in minutes, against the commit in BASE
    python -m tests.guards bits --against HEAD~3    # one of them, against another commit
    python -m tests.guards bits --examples 20000    # hours

Each side runs in processes of its own, on its own package and its own `tests.support`; the guards are this tree's.
A difference ends the command with 1, and so does a guard that could not compute a single case on both sides.

    bits      outputs, losses, gradients, buffers and the generator's state of random layers, to the last bit
    ranks     the same under FSDP2 and with experts spread over two ranks
    counts    operators, our functions, files and objects, graphs of torch.compile, launches on a GPU, peak memory

What was renamed since the earlier commit stands in `renames.tsv`, which `renames.py` describes: on the earlier
commit's side the guards reach the old objects by the new names. Fill the table in the commit that renames, and run

    python -m tests.guards --against COMMIT_BEFORE

Cases for which the earlier commit still lacks a name are left out; each guard prints how many, and why.
"""

import os
from pathlib import Path

from . import renames

#: the commit that bits, ranks and counts are held against
BASE = "584ea63"

if table := os.environ.get(renames.TABLE):
    renames.install(renames.read(Path(table)))
