"""What two workers check of layers wrapped for data parallelism: each function runs on both ranks.

Two layers with the same weights learn side by side: a plain one from the batches of both ranks, as one process would,
and a wrapped one of which every rank has its own batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import ExpertList, GatedExperts, MoE, TopKGating, ops
from support.invariance import asks_for_blocks
from support.layer_variants import LayerVariant, assert_all_close
from support.parallel_workers import gather_tensor

RANKS = 2
TOLERANCE = dict(rtol=0, atol=1e-10)
Batch = tuple[Tensor, Tensor | None]
Forward = Callable[[nn.Module, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Wrap = Callable[..., Any]  # torch has no type for a module that is sharded


# ---- ways to wrap: each returns what is called ----


def shard_gates(layer: nn.Module, **options) -> nn.Module:
    for name, module in layer.named_children():
        if name.startswith("gate"):
            fully_shard(module, **options)
    return layer


def shard_experts(layer: nn.Module, **options) -> nn.Module:
    fully_shard(layer.experts, **options)
    return layer


def shard_parts_and_layer(layer: nn.Module, **options) -> Any:
    """Gates and experts are groups of their own, gathered when they are called and freed after."""
    return fully_shard(shard_experts(shard_gates(layer, **options), **options), **options)


WRAPS: dict[str, Wrap] = {
    "gates": shard_gates,
    "experts": shard_experts,
    "layer": fully_shard,
    "parts and layer": shard_parts_and_layer,
    "DDP": DistributedDataParallel,
}


# ---- one process and two ----


def call_layer(module: nn.Module, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return module(x, mask=mask)


def call_recomputed(module: nn.Module, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return checkpoint(module, x, mask, use_reentrant=False)


def compute_losses(module: nn.Module, batch: Batch, rank: int, forward: Forward = call_layer) -> tuple[Tensor, Tensor]:
    """Output, and a loss that weighs every output differently; random numbers are the rank's own."""
    torch.manual_seed(10 + rank)
    out, aux_loss = forward(module, *batch)
    return out, (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + aux_loss


def run_plain(layer: nn.Module, batches: list[Batch]) -> dict[str, Any]:
    """Output and input gradient of this rank's batch, and the gradients of the mean of all ranks' losses."""
    rank = dist.get_rank()
    results = [compute_losses(layer, batch, index) for index, batch in enumerate(batches)]
    x, (out, loss) = batches[rank][0], results[rank]
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.stack([loss for _, loss in results]).mean().backward()
    return {"out": out, "input": grad, **{name: p.grad for name, p in layer.named_parameters()}}


def run_wrapped(layer: nn.Module, wrapped: nn.Module, batch: Batch, forward: Forward = call_layer) -> dict[str, Any]:
    """The same of the wrapped layer. Gradients that the wrapper leaves to the rank are averaged here."""
    x, mask = batch
    x = x.detach().requires_grad_()
    out, loss = compute_losses(wrapped, (x, mask), dist.get_rank(), forward)
    loss.backward()
    for parameter in layer.parameters():
        if not isinstance(parameter, DTensor) and not isinstance(wrapped, DistributedDataParallel):
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS
    return {"out": out, "input": x.grad, **{name: gather_tensor(p.grad) for name, p in layer.named_parameters()}}


def read_state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: gather_tensor(value.detach()) for name, value in layer.state_dict().items()}


def train_both(
    plain: nn.Module, layer: nn.Module, wrap: Wrap, steps: Iterable[list[Batch]], forward: Forward = call_layer
) -> Iterator[dict[str, Tensor]]:
    """Both layers learn from every step's batches, and stay equal; gives the results of the wrapped one."""
    names = list(plain.state_dict())
    wrapped = wrap(layer)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (plain, layer)]
    for batches in steps:
        expected = run_plain(plain, batches)
        actual = run_wrapped(layer, wrapped, batches[dist.get_rank()], forward)
        assert_all_close(actual, expected, **TOLERANCE)
        yield actual
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert list(layer.state_dict()) == names
        assert_all_close(read_state(layer), read_state(plain), **TOLERANCE)


# ---- every rank its own tokens, or none ----


def hide_tokens(batch: Batch) -> Batch:
    """The same tokens, all of them masked."""
    x, _ = batch
    return x, torch.zeros(x.shape[:-1], dtype=torch.bool)


def list_steps(path: LayerVariant) -> Iterator[list[Batch]]:
    """Tokens for all; for the last rank masked ones only; for the last rank no sequence at all."""
    for step, shape in enumerate([(2, 10), (2, 10), (0, 10)]):
        first = path.inputs(2, 10, seed=10 + step, dtype=torch.float64)
        last = path.inputs(*shape, seed=20 + step, dtype=torch.float64)
        yield [first, hide_tokens(last) if step == 1 else last]


def check_wrapped(path: LayerVariant, wrap: str, forward: Forward = call_layer) -> None:
    for results in train_both(path.build(), path.build(), WRAPS[wrap], list_steps(path), forward):
        assert results["experts.0.0.weight" if path.experts == "ExpertList" else "experts.w1"].any()


class Residual(nn.Module):
    """A layer with what goes around it written in place, and its auxiliary loss left alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, aux_loss = self.layer(x, mask=mask)
        out += x
        return out, aux_loss.detach()


def shard_layer_and_residual(block: Residual) -> Any:
    fully_shard(block.layer)
    return fully_shard(block)


def check_residual(path: LayerVariant) -> None:
    blocks = Residual(path.build()), Residual(path.build())
    for results in train_both(*blocks, shard_layer_and_residual, list_steps(path)):
        assert results["input"].any() or dist.get_rank() == RANKS - 1


# ---- experts without tokens ----

BUSY_EXPERTS = [{0, 1}, {0, 2}]  # experts (outer-major) that get tokens of each rank: 0 of both, 3 of none


def starve_expert(layer: nn.Module) -> None:
    """Have the layer's routers send tokens as `BUSY` says.

    The first coordinate of every token is 10, the second 10 on rank 0 and -10 on rank 1; their two rows of a router
    add 0 to the logits of busy experts and -60 to the others'. The rest of the token decides between busy ones.
    """
    with torch.no_grad():
        if hasattr(layer, "gate"):
            layer.gate.w_gating[:2] = torch.tensor([[0.0, -3, -3, -6], [0, 3, -3, 0]])
        else:
            layer.gate_outer.w_gating[:2] = torch.tensor([[0.0, -3], [0, -3]])
            layer.gate_inner.w_gating[0, :2] = torch.tensor([[0.0, -3], [0, 3]])
            layer.gate_inner.w_gating[1, :2] = torch.tensor([[0.0, -6], [0, 0]])


def starving_steps(path: LayerVariant, layers: Iterable[nn.Module]) -> Iterator[list[Batch]]:
    """Two steps in which experts get no tokens of one rank or of both, one in which no expert gets any."""
    for step in range(3):
        batches = [path.inputs(seed=RANKS * step + rank, dtype=torch.float64) for rank in range(RANKS)]
        with torch.no_grad():
            for (x, _), second in zip(batches, (10, -10), strict=True):
                x[..., :2] = torch.tensor([10, second])
            for layer in layers:
                starve_expert(layer)  # again: the last step moved the routers
        yield batches if step < 2 else [hide_tokens(batch) for batch in batches]


def select_with_gradient(grads: dict[str, Tensor], experts: nn.Module) -> set[int]:
    """Experts of which any gradient is not exactly 0."""
    found = set()
    for name, grad in grads.items():
        if name.startswith("experts."):
            listed = isinstance(experts, ExpertList)
            parts = {int(name.split(".")[1]): grad} if listed else dict(enumerate(grad.flatten(0, -3)))
            found |= {index for index, part in parts.items() if part.any()}
    return found


def check_starved_expert(path: LayerVariant) -> None:
    layers = plain, layer = [path.build(policy="none") for _ in range(2)]
    parameters = dict(plain.named_parameters())
    for rank, batch in enumerate(next(starving_steps(path, layers))):
        grads = torch.autograd.grad(compute_losses(plain, batch, rank)[1], list(parameters.values()))
        assert select_with_gradient(dict(zip(parameters, grads, strict=True)), plain.experts) == BUSY_EXPERTS[rank]
    steps = train_both(plain, layer, WRAPS["DDP"], starving_steps(path, layers))
    assert [select_with_gradient(results, layer.experts) for results in steps] == [{0, 1, 2}, {0, 1, 2}, set()]


# ---- mixed precision ----


def to_bfloat16(module: nn.Module, args: tuple) -> tuple:
    return tuple(a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def call_for_float32(module: nn.Module, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, aux_loss = module(x, mask=mask)
    return out.float(), aux_loss


def check_bfloat16(path: LayerVariant, wrap: str) -> None:
    """Float32 weights, gathered as bfloat16, give what a module of bfloat16 gives; outputs are of the input's dtype."""
    plain, layer = (path.build().float() for _ in range(2))
    part, output_dtype = (plain, torch.float32) if wrap == "layer" else (plain.experts, None)
    part.bfloat16().register_forward_pre_hook(to_bfloat16)
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=output_dtype)
    wrapped = WRAPS[wrap](layer, mp_policy=policy)
    batches = [path.inputs(seed=rank) for rank in range(RANKS)]

    expected: dict[str, Any] = {}
    for rank, batch in enumerate(batches):
        plain.zero_grad()
        out, loss = compute_losses(plain, batch, rank, call_for_float32)
        loss.backward()
        for name, parameter in plain.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad.float() / RANKS
        if rank == dist.get_rank():
            expected |= {"out": out, "input": batch[0].grad}
    actual = run_wrapped(layer, wrapped, batches[dist.get_rank()])
    assert {tensor.dtype for tensor in actual.values()} == {torch.float32}
    assert_all_close(actual, expected)


def check_the_same_bits(wrap: str) -> None:
    """Each rank has batches of its own, of one token to all: each token has the bits that one process gives it among
    all. By the fastest way it has not, where this CPU's products ask for blocks."""
    torch.manual_seed(0)
    layer = MoE(64, gate=TopKGating(64, 8), experts=GatedExperts(64, 8, 64)).float().eval()
    x = torch.randn(1, 24, 64, dtype=torch.float32)
    wrapped, differ = WRAPS[wrap](copy.deepcopy(layer)).eval(), {}
    for implementation in ("batch_invariant", "auto"):
        with ops.use(implementation), torch.no_grad():
            expected, differ[implementation] = layer(x)[0], 0
            for size in (1, 2, 7, 23):
                here = slice(dist.get_rank(), dist.get_rank() + size)
                differ[implementation] += int((wrapped(x[:, here])[0] != expected[:, here]).sum())
    assert differ["batch_invariant"] == 0
    assert differ["auto"] > 0 or not asks_for_blocks(64, 64)
