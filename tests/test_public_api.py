"""The public surface stays as it was: every name that the reference shows, its import path, signature and defaults, and
the attributes of public classes.

A change on purpose writes the snapshot anew, `python -m tests.write`, in the commit that says why.
"""

import pytest

from mixture_of_experts import MoE
from tests.support.public_api import SNAPSHOT, format_lines, format_signature, is_documented, list_surface, public_names

pytest.importorskip("transformers")  # the reference shows the part for it


def test_the_public_surface_is_the_snapshot():
    wanted = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    found = list_surface()
    changes = [f"- {line}" for line in wanted if line not in set(found)]
    changes += [f"+ {line}" for line in found if line not in set(wanted)]
    assert not changes, "\n".join(["on purpose? `python -m tests.write` writes the snapshot", *changes])
    assert found == wanted


def test_every_public_path_is_the_object_itself():
    names = public_names()
    assert len(names) > 100
    assert names["mixture_of_experts.MoE"] is MoE


def test_detects_public_api_changes():
    class Layer(MoE):
        """A layer.

        Attributes:
            first, second: two of them.
        """

        def __init__(self, dim: int, num_experts: int = 8, *, new: bool = False) -> None:
            super().__init__(dim, num_experts)

    assert format_signature(Layer) == "(dim, num_experts=8, *, new=False)"
    assert is_documented(Layer) == ["first", "second"]
    lines = set(format_lines("Layer", Layer))
    assert "Layer.forward(self, inputs, mask=None, **side)" in lines
    assert {"Layer.first", "Layer.second"} <= lines
    assert "loss_coef=0.01" in next(format_lines("MoE", MoE))
