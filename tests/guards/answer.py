"""The process of one side: reads questions, a line of JSON each, and writes the answers."""

import importlib
import json
import os
import sys
import traceback
import warnings

from .outcomes import described


def main() -> None:
    import torch  # not above: fake CUDA comes before it, in processes that begin with this file

    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # what others print is no answer
    warnings.simplefilter("ignore")  # of what is drawn on purpose
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        module, _, function = name.partition(".")
        torch.set_num_threads(1)
        try:
            found = getattr(importlib.import_module(f"tests.guards.{module}"), function)(*arguments)
            answer = {"found": found}
        except Exception as error:
            answer = {"failed": described(error), "traceback": traceback.format_exc()}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
