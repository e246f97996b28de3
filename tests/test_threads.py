"""One layer in several threads and processes: no call sees another, and workers compute what their parent does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support.concurrent_calls import Call, check_threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from mixture_of_experts import ExpertChoiceGating, GatedExperts, HeirarchicalMoE, MoE, TopKGating
from mixture_of_experts.whole_model.aux_losses import AuxLosses

pytestmark = pytest.mark.slow
DIM = 8


class Block(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.moe(x, mask)[0]


class Blocks(nn.Module):
    """A layer of each kind, whose gates draw nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        capacity = dict(capacity_factor_train=1.0, capacity_factor_eval=1.0, min_expert_capacity=1)
        self.blocks = nn.ModuleList(
            Block(moe)
            for moe in (
                MoE(DIM, 4, second_policy_train="all", second_policy_eval="threshold", group_size=4),
                HeirarchicalMoE(DIM, (2, 2), second_policy_train="all", second_policy_eval="all"),
                MoE(DIM, gate=TopKGating(DIM, 4, priority="score", **capacity), experts=GatedExperts(DIM, 4)),
                MoE(DIM, gate=ExpertChoiceGating(DIM, 4), experts=[nn.Linear(DIM, DIM) for _ in range(4)]),
                MoE(DIM, gate=TopKGating(DIM, 4, score="sigmoid", expert_bias=True), shared_expert=nn.Linear(DIM, DIM)),
            )
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, recompute: bool = False) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, mask, use_reentrant=False) if recompute else block(x, mask)
        return x


def compute_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def make_calls(model: Blocks) -> list[Call]:
    """Inference and training at several lengths, with and without masks and recomputation."""

    def infer(context: Any, x: Tensor, mask: Tensor | None, aux: AuxLosses) -> list[Tensor]:
        with context():
            return [model(x, mask)]

    def train(recompute: bool, x: Tensor, mask: Tensor | None, aux: AuxLosses) -> list[Tensor]:
        out = model(x, mask, recompute)
        loss = aux.take()
        return [out.detach(), loss.detach(), *compute_gradients(model, out.square().sum() + loss)]

    works = [partial(infer, torch.inference_mode), partial(infer, torch.no_grad), partial(train, False)]
    works.append(partial(train, True))
    calls, gen = [], torch.Generator().manual_seed(1)
    for number in range(16):
        x = torch.randn(1 + number % 3, 4 + number % 5, DIM, generator=gen)
        mask = None if number % 8 < 4 else torch.rand(x.shape[:2], generator=gen) < 0.7
        calls.append(partial(works[number % 4], x, mask))
    return calls


@pytest.mark.parametrize("training", [True, False])
def test_a_thousand_calls_of_eight_threads(training):
    model = Blocks().train(training)
    check_threads(model, make_calls(model), 32)


class ComputedDataset(Dataset):
    """What a model makes of each input, and the gradients."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.model, self.inputs = model, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> list[Tensor]:
        out = self.model(self.inputs[index])
        return [out.detach(), *compute_gradients(self.model, out.square().sum())]


# workers of a DataLoader compute on one thread: after a fork OpenMP's others are not there
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_compute_the_same(method):
    """Of a layer that the parent has used, gradients and all, before it forked, and of one that was pickled."""
    computed = ComputedDataset(Blocks(), torch.randn(4, 2, 6, DIM))
    torch.set_num_threads(1)
    expected = [computed[i] for i in range(len(computed))]
    loader = DataLoader(computed, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=100)
    for found, wanted in zip(loader, expected, strict=True):
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
