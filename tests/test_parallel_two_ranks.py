"""Expert parallelism on two ranks against one process, and what needs no ranks; `test_parallel.py` has all the rest."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import parallel_checks as checks
from support import parallel_edge_cases as odd
from support.parallel_workers import Workers
from torch import nn

from mixture_of_experts.parallel.agreement import check_ranks_agree
from mixture_of_experts.parallel.exchange import find_expert_order
from mixture_of_experts.parallel.parallelize import find_matching_submodules


@pytest.mark.parametrize("layer", ["top2", "top-k, dropless", "two levels"])
def test_two_ranks_are_one_process(workers: Workers, layer: str):
    workers.run(checks.check_exact, 2, layer)


@pytest.mark.parametrize(
    "check", [odd.check_experts_that_return_other_dtypes, odd.check_rank_with_sequences_of_no_length]
)
def test_borders(workers: Workers, check: Callable[[], None]):
    workers.run(check, 2)


def test_comparisons_have_an_empty_rank_and_an_empty_expert():
    checks.check_unequal_sizes_are_tested()


def test_rows_are_brought_to_their_experts():
    """Three experts here, rows from two ranks: rank-major becomes expert-major, in the order of the ranks."""
    received = torch.tensor([[2, 0, 1], [1, 2, 0]])
    order, inverse = find_expert_order(received, 6)
    came = ["0a", "0a", "0c", "1a", "1b", "1b"]
    assert [came[i] for i in order] == ["0a", "0a", "1a", "1b", "1b", "0c"]
    assert order[inverse].tolist() == list(range(6))


def test_rank_disagreement_is_reported(monkeypatch: pytest.MonkeyPatch):
    """The first three differences, and what is wrong on another rank."""
    mesh: Any = SimpleNamespace(size=lambda: 2, get_group=lambda: None)
    own, more = (
        {"k": 2, "a": 1, "b": 1, "c": 1},
        "k: 2 on rank 0, 3 on rank 1; a: 1 .* missing on rank 1; b: .*; and 1 more",
    )
    for other, error in (
        (({"k": 3}, ""), more),
        (({}, "no plan"), "setup failed on rank 1: no plan"),
        ((own, ""), None),
    ):
        answers = lambda told, mine, group, other=other: told.__setitem__(slice(None), [mine, other])  # noqa: E731
        monkeypatch.setattr(dist, "all_gather_object", answers)
        if error is None:
            check_ranks_agree(lambda: own, mesh)
            continue
        with pytest.raises(ValueError, match=error):
            check_ranks_agree(lambda: own, mesh)


def test_a_key_of_a_plan_names_each_module_once():
    one, other = nn.Identity(), nn.Identity()
    model = nn.ModuleDict({name: nn.ModuleDict({"ffn": ffn}) for name, ffn in (("a", one), ("b", one), ("c", other))})
    assert find_matching_submodules(model, "*.ffn") == {one: "a.ffn", other: "c.ffn"}
    assert find_matching_submodules(model, "") == {model: ""}
    assert find_matching_submodules(model, "*") == {model[name]: name for name in "abc"}
    assert not find_matching_submodules(model, "*.mlp")
