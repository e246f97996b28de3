"""The versions that a comparison on a GPU requires. Nothing here imports this package, which an old torch may not."""

from __future__ import annotations

import re
from importlib import metadata

MIN_TORCH = "2.10"  # the first release with F.grouped_mm, which the experts call on a GPU


class OldTorchError(Exception):
    """The installed torch cannot run the GPU implementations."""


def parse_release(version: str) -> tuple[int, int]:
    """Return the major and minor number of a version."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def check_torch(version: str) -> None:
    """Raise an error if this version of torch is too old."""
    if parse_release(version) < parse_release(MIN_TORCH):
        raise OldTorchError(
            f"torch {version} is too old: the GPU implementations need torch {MIN_TORCH} or newer (F.grouped_mm). "
            "Another package may have replaced it; install the newer one in a fresh environment"
        )


def find_torch_conflict(distribution: str, torch_version: str) -> str | None:
    """Return which torch an installed distribution requires, if it is not this version. Return None if the distribution
    is not installed or accepts this version."""
    from packaging.requirements import Requirement  # installed with pytest
    from packaging.version import Version

    try:
        required = map(Requirement, metadata.requires(distribution) or ())
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    for requirement in required:
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "torch" and applies:
            release = Version(torch_version).public  # "2.13.0+cu130" without the build
            if not requirement.specifier.contains(release, prereleases=True):
                return f"{distribution} {version} requires torch{requirement.specifier}, this is torch {torch_version}"
    return None
