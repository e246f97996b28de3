"""What FSDP2 must find in the results of gates, and what it must not find in the arguments of experts.

To gather a unit's parameters in the backward, FSDP2 registers a hook on every tensor that it finds in the unit's
output. Torch 2.13 searches dataclasses for them, torch 2.10 registered pytrees: a gate's result must be both. Mixed
precision casts every floating-point tensor that it finds in a unit's arguments. Both versions search dataclasses for
them: experts must receive none. Each check runs on both ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_leaves, tree_map

from mixture_of_experts.parallel import shard_routers
from support.data_parallel_checks import RANKS
from support.layer_variants import DIM, HIDDEN, NUM_EXPERTS, LayerVariant, assert_all_close
from support.parallel_workers import gather_tensor

GATES = ("gate", "gate_outer", "gate_inner")
Loss = Callable[[Tensor, Tensor], Tensor]


def find_gates(layer: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in layer.named_children() if name in GATES}


# ---- one process and two ----


def weigh_output(out: Tensor) -> Tensor:
    """A sum with an integer weight for each element: in bfloat16 the weights and their sums over features are exact."""
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    return out.flatten() @ (torch.arange(out.numel()) * 7 % 11 - 5).to(out.dtype)


LOSSES: dict[str, Loss] = {
    "output and losses": lambda out, aux_loss: weigh_output(out) + aux_loss,
    "output": lambda out, aux_loss: weigh_output(out),
    "losses": lambda out, aux_loss: aux_loss,
}


class Run(NamedTuple):
    """Results of this rank's batch, and the gradients of the mean of all ranks' losses."""

    results: dict[str, Tensor]
    grads: dict[str, Tensor]


def run_single_process(layer: nn.Module, batches: list[Tensor], loss: Loss) -> Run:
    """Run an unsharded layer on the batches of all ranks."""
    results, inputs = [], [x.detach().requires_grad_() for x in batches]
    for rank, x in enumerate(inputs):
        torch.manual_seed(rank)
        results.append(layer(x))
    torch.stack([loss(*result) for result in results]).mean().backward()
    own = dist.get_rank()
    out, aux_loss = results[own]
    assert inputs[own].grad is not None
    return Run({"out": out, "aux_loss": aux_loss, "input": inputs[own].grad * len(batches)}, read_gradients(layer))


def run_rank(layer: nn.Module, x: Tensor, loss: Loss, input_requires_grad: bool = True) -> Run:
    """Run a layer with sharded parts on this rank's batch; gradients of its other parts are averaged here."""
    x = x.detach().requires_grad_(input_requires_grad)
    torch.manual_seed(dist.get_rank())
    out, aux_loss = layer(x)
    loss(out, aux_loss).backward()
    for parameter in layer.parameters():
        if not hasattr(parameter, "device_mesh") and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS
    results = {"out": out, "aux_loss": aux_loss}
    return Run(results if x.grad is None else {**results, "input": x.grad}, read_gradients(layer))


def read_gradients(layer: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name; zeros for a parameter without one."""
    gradients = {}
    for name, parameter in layer.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients[name] = gather_tensor(grad.detach())
    return gradients


# ---- gates and the shared expert are found ----


def make_shared_expert() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 5), nn.GELU(), nn.Linear(5, DIM, bias=False))


class Units(NamedTuple):
    """How gates and shared expert become units, and whether the layer's input requires a gradient."""

    reshard: bool
    in_layer: bool
    input_requires_grad: bool

    def shard(self, layer: nn.Module) -> None:
        for part in (*find_gates(layer).values(), layer.shared_expert):
            fully_shard(part, reshard_after_forward=self.reshard)
        if self.in_layer:
            fully_shard(layer)


# with each of these, a gate fails or gets no gradient if FSDP2 does not find the tensors of its result
UNITS = {
    "gathered again in the backward": Units(reshard=True, in_layer=False, input_requires_grad=True),
    "gathered once": Units(reshard=False, in_layer=False, input_requires_grad=False),
    "in a sharded layer": Units(reshard=True, in_layer=True, input_requires_grad=True),
}


def check_gates(path: LayerVariant, units: str, loss: str) -> None:
    """Sharded gates and shared expert give what one process gives; the second step uses the updated parameters."""
    plain, layer = (path.build(shared_expert=make_shared_expert()) for _ in range(2))
    layer.load_state_dict(plain.state_dict())
    UNITS[units].shard(layer)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (plain, layer)]
    for step in range(2):
        batches = [path.inputs(seed=RANKS * step + rank, dtype=torch.float64)[0] for rank in range(RANKS)]
        expected = run_single_process(plain, batches, LOSSES[loss])
        actual = run_rank(layer, batches[dist.get_rank()], LOSSES[loss], UNITS[units].input_requires_grad)
        for name in actual.results:
            torch.testing.assert_close(actual.results[name], expected.results[name], rtol=0, atol=1e-10)
        assert_all_close(actual.grads, expected.grads, rtol=0, atol=1e-10)
        assert all(expected.grads[f"{name}.w_gating"].any() for name in find_gates(layer))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


# ---- the experts' weights are not found ----

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SATURATED = 32.0  # GELU and SiLU of it are 32, and tanh is 1, in float32 and in bfloat16
EPSILON = 2.0**-8  # of bfloat16


def shard_half_experts(layer: nn.Module) -> None:
    fully_shard(layer.experts, mp_policy=HALF)


def shard_half_experts_and_layer(layer: nn.Module) -> None:
    """Gates stay in float32; experts and the layer are units of bfloat16."""
    shard_routers(layer)
    shard_half_experts(layer)
    fully_shard(layer, mp_policy=HALF)


HALF_UNITS = {"experts": shard_half_experts, "experts in a sharded layer": shard_half_experts_and_layer}


def list_matrices(experts: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """Each matrix `(in, out)` of the experts, with the index of its expert."""
    if isinstance(experts, nn.ModuleList):
        for index, expert in enumerate(experts):
            yield from ((index, parameter.data.T) for parameter in expert.parameters() if parameter.ndim == 2)
    else:
        for parameter in experts.parameters():
            yield from enumerate(parameter.data.flatten(0, -3))


def set_constant_experts(experts: nn.Module) -> None:
    """Have the first half of the experts map every token whose first feature is 1 to one power of two, and the second
    half to its negative.

    All numbers on the way are exact in bfloat16, so that an output is exact up to the weights of its sum, and weights
    of experts with different signs are subtracted from each other: their rounding shows.
    """
    for parameter in experts.parameters():
        parameter.data.zero_()
    for index, matrix in list_matrices(experts):
        if matrix.shape == (DIM, HIDDEN):
            matrix[0, 0] = SATURATED
        else:
            matrix[0] = 1.0 if index < NUM_EXPERTS // 2 else -1.0


def build_rounding_layer(path: LayerVariant) -> tuple[nn.Module, list[Tensor]]:
    """A layer in which rounded weights show, and the tokens of every rank."""
    layer = path.build(policy="all").float()
    set_constant_experts(layer.experts)
    for gate in find_gates(layer).values():
        gate.w_gating.data.mul_(0.1)  # similar weights, of which the differences lose most of their bits
        if path.capacity == "capacity":
            gate.capacity_factor_train = 4.0  # a token with one expert has nothing to subtract
    batches = [path.inputs(seed=rank)[0].detach().bfloat16().float() for rank in range(RANKS)]
    for x in batches:
        x[..., 0] = 1.0
    return layer, batches


def round_floats(gate: nn.Module, args: Any, routing: Any) -> Any:
    """A forward hook that rounds what the gate returns to bfloat16."""
    is_float = lambda leaf: isinstance(leaf, Tensor) and leaf.is_floating_point()  # noqa: E731
    return tree_map(lambda leaf: leaf.bfloat16().to(leaf.dtype) if is_float(leaf) else leaf, routing)


def exceeds_rounding(actual: Tensor, expected: Tensor) -> Tensor:
    """Which outputs differ by more than one rounding to bfloat16."""
    return (actual.float() - expected).abs() > EPSILON * expected.abs() + 1e-5


def check_weights(path: LayerVariant, units: str) -> None:
    """Outputs of bfloat16 experts are summed with the weights of a float32 layer; gates return float32 and get its
    gradients."""
    plain, batches = build_rounding_layer(path)
    rounded, layer = copy.deepcopy(plain), copy.deepcopy(plain)
    HALF_UNITS[units](layer)
    returned: list[Any] = []
    for gate in find_gates(layer).values():
        gate.register_forward_hook(lambda gate, args, routing: returned.append(routing))
    for gate in find_gates(rounded).values():
        gate.register_forward_hook(round_floats)
    loss, x = LOSSES["output and losses"], batches[dist.get_rank()]
    expected, actual = run_single_process(plain, batches, loss), run_rank(layer, x, loss)

    shows = exceeds_rounding(rounded(x)[0], expected.results["out"])
    assert shows.float().mean() > 0.25
    wrong = exceeds_rounding(actual.results["out"], expected.results["out"])
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} outputs are combined with rounded weights"
    for routing in returned:
        floats = [leaf for leaf in tree_leaves(routing) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        assert {leaf.dtype for leaf in floats} == {torch.float32}
        assert any(leaf.requires_grad for leaf in floats)
    assert len(returned) == len(find_gates(layer))
    for name in find_gates(layer):
        key = f"{name}.w_gating"
        torch.testing.assert_close(actual.grads[key], expected.grads[key], rtol=1e-5, atol=1e-5)
