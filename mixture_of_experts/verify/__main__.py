"""Command-line interface: `python -m mixture_of_experts.verify FACTORY` verifies the module that `FACTORY`
("package.module:function") returns.

The function takes no arguments, and returns either a module or a pair of a module and a dictionary of arguments for
`verify`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from torch import nn

from mixture_of_experts.verify import PROPERTIES, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify a module, print the report, and return the exit status. Exit with status 2 if the module cannot be
    verified."""
    parser = argparse.ArgumentParser(prog="python -m mixture_of_experts.verify", description=__doc__)
    parser.add_argument("factory", help='"package.module:function", importable from the current directory')
    parser.add_argument("--only", nargs="+", metavar="PROPERTY", help=f"measure only these of {', '.join(PROPERTIES)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    path, _, name = options.factory.partition(":")
    try:
        result = getattr(importlib.import_module(path), name)()
        module, verify_arguments = (result, {}) if isinstance(result, nn.Module) else result
        report = verify(module, properties=options.only, **verify_arguments)
    except Exception as error:  # the factory and the module may raise any error
        parser.error(str(error))
    print(report.to_json() if options.json else report)
    return int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
