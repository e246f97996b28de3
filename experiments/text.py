"""Adds the source code of installed packages to the text. The text depends only on the package versions.

`pip install -e .[examples]` installs these packages. Records contain the versions, so another machine can install the
same text.
"""

import hashlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from .language_model.corpus import SKIPPED_FOLDERS, Corpus, split_files, standard_library_files, user_files

PACKAGES = ("torch", "sympy", "numpy", "networkx", "matplotlib", "fonttools", "mpmath", "pillow", "fsspec")
# Builds of the same version differ only in these files. They are skipped, so that the text does not depend on whether a
# machine has a GPU.
BUILD_FILES = frozenset({"version.py", "_version.py"})
LONGEST_FILE = 200_000  # in bytes; longer files are skipped as tables


@dataclass(frozen=True)
class Text(Corpus):
    """A corpus with its sources, such as "python 3.11.7" and "sympy 1.14.0". `sources` is empty for your own files."""

    sources: tuple[str, ...] = ()


def load_text(paths: Sequence[Path] = (), packages: Sequence[str] = ()) -> Text:
    """Load the given files, or by default the source code of the standard library and the given packages."""
    if paths:
        return Text(**vars(split_files(user_files(paths))))
    files = standard_library_files()
    if packages:
        files = without_copies([*files, *package_files(packages)])
    python, versions = platform.python_version(), [f"{name} {distribution(name).version}" for name in packages]
    return Text(**vars(split_files(files)), sources=(f"python {python}", *versions))


def package_files(packages: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of the packages' Python files, without tests and tables."""
    for package in packages:
        for path in sorted(distribution(package).files or ()):
            skipped = SKIPPED_FOLDERS.intersection(path.parts[:-1]) or path.name in BUILD_FILES or ".." in path.parts
            if path.suffix == ".py" and not skipped:
                content = path.read_binary()
                if len(content) <= LONGEST_FILE:
                    yield path.as_posix(), content


def without_copies(files: Sequence[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Sort files by name and keep only the first of identical files, so that no training file is held out as well."""
    first = {hashlib.sha256(content).digest(): (name, content) for name, content in sorted(files, reverse=True)}
    return sorted(first.values())
