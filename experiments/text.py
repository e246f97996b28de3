"""More text than the standard library: the sources of installed packages, the same for the same versions.

The packages are what `pip install -e .[examples]` brings along. A record keeps their versions, so that another machine
can be given the same text.
"""

import hashlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from .language_model.corpus import SKIPPED_FOLDERS, Corpus, split_files, standard_library_files, user_files

PACKAGES = ("torch", "sympy", "numpy", "networkx", "matplotlib", "fonttools", "mpmath", "pillow", "fsspec")
# Builds of one version differ in this file alone, so that a machine with a GPU has the text of one without.
BUILD_FILES = frozenset({"version.py", "_version.py"})
LONGEST_FILE = 200_000  # bytes: what is longer is a table


@dataclass(frozen=True)
class Text(Corpus):
    """A corpus that says where it is from: "python 3.11.7", "sympy 1.14.0", ...; nothing for one's own files."""

    sources: tuple[str, ...] = ()


def load_text(paths: Sequence[Path] = (), packages: Sequence[str] = ()) -> Text:
    """The given files; if there are none, the sources of the standard library and of the given packages."""
    if paths:
        return Text(**vars(split_files(user_files(paths))))
    files = standard_library_files()
    if packages:
        files = without_copies([*files, *package_files(packages)])
    python, versions = platform.python_version(), [f"{name} {distribution(name).version}" for name in packages]
    return Text(**vars(split_files(files)), sources=(f"python {python}", *versions))


def package_files(packages: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the packages' Python sources: no tests, no tables."""
    for package in packages:
        for path in sorted(distribution(package).files or ()):
            skipped = SKIPPED_FOLDERS.intersection(path.parts[:-1]) or path.name in BUILD_FILES or ".." in path.parts
            if path.suffix == ".py" and not skipped:
                content = path.read_binary()
                if len(content) <= LONGEST_FILE:
                    yield path.as_posix(), content


def without_copies(files: Sequence[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """The files in the order of their names, of equal ones the first: what is held out is not trained on too."""
    first = {hashlib.sha256(content).digest(): (name, content) for name, content in sorted(files, reverse=True)}
    return sorted(first.values())
