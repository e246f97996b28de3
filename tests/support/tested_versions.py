"""The tested version of every package, from tests/constraints.txt. `python -m tests.support.tested_versions` prints the
installed versions that differ.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def read_tested_versions() -> dict[str, str]:
    """The version of each package that the file has for this Python and platform."""
    requirements = [Requirement(line) for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()]
    here = [each for each in requirements if each.marker is None or each.marker.evaluate()]
    return {each.name: str(each.specifier).removeprefix("==") for each in here}


def find_differences() -> dict[str, tuple[str, str]]:
    """The tested and the installed version of each package whose installed version is another."""
    found = {}
    for name, tested in read_tested_versions().items():
        try:
            installed = Version(version(name)).public  # without "+cpu"
        except PackageNotFoundError:
            continue
        if installed != tested:
            found[name] = (tested, installed)
    return found


if __name__ == "__main__":
    for name, (tested, installed) in find_differences().items():
        print(f"{name}: tested with {tested}, installed is {installed}")
