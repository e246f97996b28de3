"""Loading of the recorded cases, and comparing with them."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"
ATOL = {"combine": 3e-7, "loss": 3e-7, "gradient": 3e-6, "output": 4e-6}


def list_cases(*prefixes: str) -> list[str]:
    """Names of the cases whose name starts with one of the prefixes."""
    return sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem.startswith(prefixes))


class GoldenCase:
    """One recorded case: `case["inputs"]` is an array of it as a tensor, `case.hyper` its hyperparameters."""

    def __init__(self, name: str):
        self.name = name
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files if key != "meta"}
            self.meta = json.loads(str(file["meta"]))

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key].copy())

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def get(self, key: str) -> Tensor | None:
        """The array, or None where the case has none of this name."""
        return self[key] if key in self.arrays else None

    @property
    def hyper(self) -> dict:
        return self.meta["hparams"]

    @property
    def mode(self) -> str:
        return "train" if self.meta["train"] else "eval"

    @cached_property
    def k(self) -> int:
        """Choices a token, for the gate cases."""
        if self.name.startswith("topn"):
            return self.hyper["moe_top_n_num_experts_per_token"]
        return 1 if self.name.startswith("switch") else 2

    def factor_for(self, capacity: int) -> float:
        """A capacity factor (in slots a token) that gives this capacity and no other."""
        *_, n, e, _ = self["combine"].shape
        return (capacity + 0.5) * e / n

    def expert_first(self, key: str) -> Tensor:
        """Expert weights of a two-level case, recorded inner expert first, with the outer expert first."""
        return self[key].transpose(0, 1)


def assert_matches(got: Tensor, expected: Tensor, kind: str, what: str = "") -> None:
    """Compare within the tolerance of the recorded cases.

    It is relative to the array's largest value where that is above 1: entries of these gradients reach 40, and the
    recorded float32 values then differ from a float64 computation by up to 1e-5.
    """
    tolerance = ATOL[kind]
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(
        got.detach().to(expected.dtype),
        expected,
        atol=tolerance * scale,
        rtol=tolerance,
        msg=lambda text: f"{what or kind}: {text}",
    )
