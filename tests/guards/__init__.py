"""Guards of a rebuilding: what must stay equal between this tree and an earlier commit, side by side.

    python -m tests.guards                          # all, in minutes, against the commit in BASE
    python -m tests.guards bits --against HEAD~3    # one of them, against another commit
    python -m tests.guards bits --examples 20000    # hours

Each side runs in processes of its own, on its own package and its own `tests.support`; the guards are this tree's.
A difference ends the command with 1.

    bits      outputs, losses, gradients, buffers and the generator's state of random layers, to the last bit
    ranks     the same under FSDP2 and with experts spread over two ranks
    counts    operators, our functions, files and objects, graphs of torch.compile, launches on a GPU, peak memory
"""

#: the commit that bits, ranks and counts are held against
BASE = "584ea63"
