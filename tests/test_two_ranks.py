"""Expert parallelism on two ranks against one process, and what needs no ranks; `test_parallel.py` has all the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import parallel_checks as checks
from support import parallel_odd_models as odd
from support.parallel_workers import Workers

from mixture_of_experts.parallel.exchange import by_expert


@pytest.mark.parametrize("layer", ["top2", "top-k, dropless", "top2, list", "two levels"])
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
    order, inverse = by_expert(received, 6)
    came = ["0a", "0a", "0c", "1a", "1b", "1b"]
    assert [came[i] for i in order] == ["0a", "0a", "1a", "1b", "1b", "0c"]
    assert order[inverse].tolist() == list(range(6))
