"""What the workers of `test_parallel.py` are asked to check: each function runs on every rank of a fresh gloo group."""

from __future__ import annotations

import copy
import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mixture_of_experts import Experts, HeirarchicalMoE, MoE, ReLUGating, Routing, TopKGating, ops
from mixture_of_experts.gating import Gate
from mixture_of_experts.parallel import (
    ExpertParallel,
    average_gradients,
    clip_grad_norm_,
    exchange,
    expert_parameters,
    fully_shard_experts,
    ignore_experts_in_ddp,
    parallelize_module,
    replicated_parameters,
)
from mixture_of_experts.replay import record_routing, replay_routing
from mixture_of_experts.support import private_torch
from support.parallel_layers import (
    DIM,
    EXPERTS,
    HIDDEN,
    LENGTH,
    SIZES,
    CustomExperts,
    Model,
    local_part,
    make_batch,
    make_layer,
    make_shared_expert,
    make_top2,
    replicate_layer,
)
from support.parallel_workers import gather_tensor, get_rank

TOLERANCE = dict(rtol=0, atol=1e-10)


def make_mesh(data_parallel: int = 1) -> DeviceMesh:
    """All ranks in a mesh ("dp", "ep")."""
    shape = (data_parallel, dist.get_world_size() // data_parallel)
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))


def parallelize_model(model: nn.Module, mesh: DeviceMesh, key: str = "", **options: Any) -> nn.Module:
    """The model with its layer at `key` spread over the mesh's "ep"; the batch is that of all ranks."""
    style = ExpertParallel(batch_group=dist.group.WORLD, **options)
    return parallelize_module(model, mesh["ep"], {key: style})


def gather_gradient(parameter: Tensor, own: bool, mesh: DeviceMesh, gradient: str = "mean") -> Tensor:
    """The gradient of a parameter over all ranks' losses, as DDP or FSDP2 would leave it."""
    value, ranks = gather_tensor(parameter.grad).clone(), mesh["dp"].get_group() if own else dist.group.WORLD
    dist.all_reduce(value, group=ranks)
    return value / dist.get_world_size(ranks) if gradient == "mean" else value


@contextmanager
def record_losses(model: nn.Module):
    """The named losses of every routing, with the z-loss."""
    losses: list[dict[str, Tensor]] = []

    def record(gate: nn.Module, args: object, routing: Routing) -> None:
        losses.append({**routing.losses, "z": routing.z_loss, "balance_loss": routing.balance_loss})

    hooks = [gate.register_forward_hook(record) for gate in model.modules() if isinstance(gate, Gate)]
    yield losses
    for hook in hooks:
        hook.remove()


def check_exact(layer: str, data_parallel: int = 1, masked: bool = False, gradient: str = "mean") -> None:
    """Outputs, losses and all gradients are those of one process on the whole batch."""
    mesh, world = make_mesh(data_parallel), dist.get_world_size()
    alone = make_layer(layer)
    together = parallelize_model(copy.deepcopy(alone), mesh, gradient=gradient, replicated=replicate_layer(layer))
    x, mask = make_batch(masked)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) / x[..., 0].numel()

    x_alone = x.clone().requires_grad_()
    with record_losses(alone) as losses_alone:
        out_alone, aux_alone = alone(x_alone, mask)
    ((out_alone * cotangent).sum() + aux_alone).backward()

    # every rank's loss is its part of the mean over all tokens, times the number of ranks
    x_own = local_part(x).clone().requires_grad_()
    with record_losses(together) as losses_own:
        out_own, aux_own = together(x_own, None if mask is None else local_part(mask))
    share = (out_own * local_part(cotangent)).sum() * world + aux_own
    (share if gradient == "mean" else share / world).backward()

    torch.testing.assert_close(out_own, local_part(out_alone), **TOLERANCE)
    scale = world if gradient == "mean" else 1
    torch.testing.assert_close(x_own.grad / scale, local_part(x_alone.grad), **TOLERANCE)
    check_same_losses(losses_own, losses_alone)
    check_same_gradients(together, alone, mesh, gradient)
    check_same_counts(together, alone)


def check_same_losses(own: list[dict[str, Tensor]], alone: list[dict[str, Tensor]]) -> None:
    """The ranks' average of every loss is that of the whole batch."""
    assert len(own) == len(alone) > 0
    for mine, theirs in zip(own, alone, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            average = value.detach().clone()
            dist.all_reduce(average)
            average = average / dist.get_world_size()
            torch.testing.assert_close(average, theirs[name].detach(), **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def check_same_gradients(together: nn.Module, alone: nn.Module, mesh: DeviceMesh, gradient: str = "mean") -> None:
    own, reference = expert_parameters(together), dict(alone.named_parameters())
    assert own
    seen = 0
    for name, parameter in together.named_parameters():
        assert parameter.grad is not None, name
        found = gather_gradient(parameter, name in own, mesh, gradient)
        torch.testing.assert_close(found, reference[name].grad, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        seen += 1
    assert seen == len(reference)


def check_same_counts(together: nn.Module, alone: nn.Module) -> None:
    """The expert bias, and the coefficient of ReLU routers, move as they do in one process."""
    one = get_rank()
    for gate, reference in zip(together.modules(), alone.modules(), strict=False):
        if getattr(gate, "expert_bias", None) is not None:
            assert reference.expert_counts.sum() > 0
            gate.update_bias(1e-3)
            reference.update_bias(1e-3, one)
            assert torch.equal(gate.expert_bias, reference.expert_bias)
            assert gate.expert_bias.abs().sum() > 0
        if isinstance(gate, ReLUGating):
            counts = gate.choice_counts.clone()
            dist.all_reduce(counts)
            assert torch.equal(counts, reference.choice_counts)
            for each, group in ((gate, None), (reference, one)):
                each.update_l1(group=group)
            assert gate.l1_coef == reference.l1_coef != 0.3


def check_unequal_sizes_are_tested() -> None:
    """The exact comparisons above do have a rank without tokens, and an expert without."""
    moe = make_layer("top-k, dropless")
    routing = moe.gate(make_batch()[0])
    assert 0 in SIZES[4]
    assert len(set(SIZES[2])) == 2
    assert routing.queue_length.sum(0)[3] == 0
    assert moe.num_experts == EXPERTS


# ---- setting up ----


def check_refusals() -> None:
    """What cannot be spread is refused with the reason, before anything is changed."""
    mesh = make_mesh()
    one_dimensional = mesh["ep"]
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"ffn": make_layer("top2")}) for _ in range(2)])})
    spreads, listed = ExpertParallel(), MoE(DIM, experts=[nn.Linear(DIM, DIM) for _ in range(EXPERTS)])
    wrapped = MoE(DIM, experts=checkpoint_wrapper(Experts(DIM, EXPERTS)))
    for error, where, layer, plan in (
        (r"'layers.\*.fnn' does not match .* layers.0.ffn", one_dimensional, model, {"layers.*.fnn": spreads}),
        ("1-D mesh, but got a 2-D mesh with dimensions", mesh, model, {"layers.*.ffn": spreads}),
        (r"layers\.0: .* got ModuleDict", one_dimensional, model, {"layers.*": spreads}),
        ("6 experts cannot be divided evenly among 4 ranks", one_dimensional, MoE(DIM, 6), spreads),
        ("2 outer experts cannot be divided evenly among 4", one_dimensional, HeirarchicalMoE(DIM, (2, 4)), spreads),
        (r"must have .* \(8,\), got", one_dimensional, MoE(DIM, EXPERTS, experts=nn.Linear(7, 7)), spreads),
        (r"replicated contains \['w9'\]", one_dimensional, make_layer("top2"), ExpertParallel(replicated=["w9"])),
        ("a list of modules cannot be sharded .* stack its weights", one_dimensional, listed, spreads),
        ("experts is wrapped in a CheckpointWrapper; apply Exp", one_dimensional, wrapped, spreads),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            parallelize_module(layer, where, plan)
    with pytest.raises(ValueError, match=r"gradient must be one of 'mean', 'sum', got 'average'"):
        ExpertParallel(gradient="average")
    parallelize_module(model, one_dimensional, {"layers.*.ffn": spreads})
    with pytest.raises(ValueError, match="already sharded"):
        parallelize_module(model, one_dimensional, {"layers.0.ffn": spreads})


def check_sharded_parameters() -> None:
    """Names stay, stacks become DTensors of which a rank stores its part, the rest starts as on the first rank."""
    torch.manual_seed(dist.get_rank())
    moe = make_top2(shared_expert=make_shared_expert())
    names, mine = list(moe.state_dict()), copy.deepcopy(moe.state_dict())
    parallelize_module(moe, make_mesh()["ep"], ExpertParallel())
    assert list(moe.state_dict()) == names
    assert isinstance(moe.experts, Experts)
    for name, value in moe.state_dict().items():
        start = mine[name].clone()
        dist.broadcast(start, 0)
        assert isinstance(value, DTensor) == name.startswith("experts."), name
        assert torch.equal(gather_tensor(value), start), name
    local = moe.experts.w1.to_local()
    assert local.shape == (2, DIM, HIDDEN)
    assert local.untyped_storage().nbytes() == local.nbytes
    assert f"experts {2 * dist.get_rank()} to {2 * dist.get_rank() + 1} of 8 on this rank" in repr(moe)
    assert set(expert_parameters(moe)) == {"experts.w1", "experts.w2"}


def check_source_rank_none() -> None:
    """With `src_data_rank=None` every rank's own parameters are right, and nothing of the whole is kept alive."""
    moe = make_layer("top2")
    mine = moe.experts.w1.detach().clone()
    parallelize_module(moe, make_mesh()["ep"], ExpertParallel(), src_data_rank=None)
    local = moe.experts.w1.to_local()
    assert torch.equal(local, mine.chunk(dist.get_world_size())[dist.get_rank()])
    assert local.untyped_storage().nbytes() == local.nbytes


def check_meta_start() -> None:
    """A model built without memory gets weights on its own rank only, other ones on every rank."""
    with torch.device("meta"):
        moe = MoE(DIM, EXPERTS, 50)
    parallelize_model(moe, make_mesh())
    moe.to_empty(device="cpu")
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            torch.manual_seed(1 + dist.get_rank() if module is moe.experts else 0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="DTensor random operators")  # draw alike with equal seeds
                module.reset_parameters()
    whole = moe.experts.w1.full_tensor().detach()
    assert len(whole.flatten().unique()) == whole.numel()
    torch.testing.assert_close(whole.std(), torch.tensor(DIM**-0.5), rtol=0.05, atol=0)
    gates = [torch.empty_like(moe.gate.w_gating) for _ in range(dist.get_world_size())]
    dist.all_gather(gates, moe.gate.w_gating.detach())
    assert all(torch.equal(gate, gates[0]) for gate in gates)


def check_group_of_gates() -> None:
    """Gates get the batch's group, or the mesh's if they have none; one they have stays. Groups keep their timeouts."""
    mesh = make_mesh(data_parallel=2)
    groups = [dist.group.WORLD, mesh["ep"].get_group(), mesh["dp"].get_group()]
    before = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    assert before[0] != before[1]
    for moe, options, expected in (
        (make_layer("two levels"), {}, mesh["ep"].get_group()),
        (make_layer("two levels"), {"batch_group": dist.group.WORLD}, dist.group.WORLD),
        (make_layer("two levels"), {"batch_group": mesh["dp"]}, mesh["dp"].get_group()),
    ):
        parallelize_module(moe, mesh["ep"], ExpertParallel(**options))
        assert moe.gate_outer.process_group is moe.gate_inner.process_group is expected
    moe = MoE(DIM, gate=TopKGating(DIM, EXPERTS, process_group=dist.group.WORLD), experts=Experts(DIM, EXPERTS))
    parallelize_module(moe, mesh["ep"], ExpertParallel())
    assert moe.gate.process_group is dist.group.WORLD
    assert [group._get_backend(torch.device("cpu")).options._timeout for group in groups] == before


def check_copies() -> None:
    """A gate with a process group is copied and saved, a spread layer is copied."""
    gate = TopKGating(DIM, EXPERTS, process_group=dist.group.WORLD)
    assert copy.deepcopy(gate).process_group is dist.group.WORLD
    assert list(gate.state_dict()) == ["w_gating"]
    moe = parallelize_model(make_layer("top2"), make_mesh())
    twin = copy.deepcopy(moe)
    out, same = moe(local_part(make_batch()[0]))[0], twin(local_part(make_batch()[0]))[0]
    assert torch.equal(out, same)
    nn.init.zeros_(next(twin.experts.parameters()))
    assert next(moe.experts.parameters()).abs().sum() > 0


def check_replay() -> None:
    """A rank records its own sequences, as one process does; replayed, they overrule another router on all ranks."""
    alone = make_layer("top-k, dropless")
    together, x = parallelize_model(copy.deepcopy(alone), make_mesh()), make_batch()[0]
    with record_routing(alone) as whole, record_routing(together) as own:
        alone(x)
        together(local_part(x))
    begin = sum(SIZES[dist.get_world_size()][: dist.get_rank()])
    for i, record in enumerate(own["gate"]):
        assert torch.equal(record, whole["gate"][begin + i])
    for moe in (alone, together):
        moe.gate.w_gating.data.neg_()
    with replay_routing(alone, whole), replay_routing(together, own):
        wanted, got = alone(x)[0], together(local_part(x))[0]
    torch.testing.assert_close(got, local_part(wanted), **TOLERANCE)
    assert not torch.allclose(alone(x)[0], wanted)


class ReadingGate(TopKGating):
    """Notes the dtypes of its side inputs."""

    side_inputs = (*TopKGating.side_inputs, "ids", "features")
    seen: dict[str, torch.dtype]

    def decide(self, tokens):
        self.seen = {name: value.dtype for name, value in tokens.side.items()}
        return super().decide(tokens)


def check_side_inputs_under_fsdp2() -> None:
    """Its mixed precision casts numbers with a point and no others, unless it is told not to."""
    x, ids = local_part(make_batch()[0]).bfloat16(), torch.zeros(SIZES[2][dist.get_rank()], LENGTH, dtype=torch.int64)
    for cast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        moe = MoE(DIM, gate=ReadingGate(DIM, EXPERTS))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast)
        fully_shard(moe, mp_policy=policy)
        out, aux_loss = moe(x, ids=ids, features=torch.randn(*ids.shape, 3, dtype=torch.float32))
        (out.sum() + aux_loss).backward()
        assert moe.gate.seen == {"ids": torch.int64, "features": dtype}


# ---- collectives and bytes ----


class Collectives(TorchDispatchMode):
    """Names of the collectives that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        if namespace in ("c10d", "_c10d_functional") and "wait" not in name:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def check_one_rank_has_no_collective() -> None:
    for layer in ("top2", "top-k, dropless", "two levels"):
        alone = make_layer(layer)
        moe = parallelize_module(copy.deepcopy(alone), make_mesh()["ep"], ExpertParallel())
        x, _ = make_batch()
        with Collectives() as collectives:
            out, aux_loss = moe(x)
            (out.sum() + aux_loss).backward()
        assert collectives.names == []
        torch.testing.assert_close(out, alone(x)[0], **TOLERANCE)


def check_number_of_collectives() -> None:
    """There, back, and the same for the gradients; sizes are told unless they are promised to be equal, for the same
    numbers."""
    x, outputs = torch.randn(2, LENGTH, DIM).requires_grad_(), {}
    for layer, options, expected in (
        ("top2", {"static_shapes": True}, 4),
        ("top2", {}, 5),
        ("top-k, dropless", {"static_shapes": True}, 5),
        ("top-k, dropless", {}, 5),
    ):
        moe = parallelize_model(make_layer(layer), make_mesh(), **options)
        with Collectives() as collectives:
            out, aux_loss = moe(x)
            (out.sum() + aux_loss).backward()
        assert collectives.names.count("all_to_all_single") == expected, (layer, options, collectives.names)
        assert torch.equal(out, outputs.setdefault(layer, out))


def check_autocast_sends_half() -> None:
    """Under autocast stacked experts get their tokens in bfloat16; results are those of one process."""
    sent = []
    channel = exchange.Channel.transfer

    def record(self, x: Tensor, *args: Any) -> Tensor:
        sent.append(x.dtype)
        return channel(self, x, *args)

    alone = make_layer("top-k, dropless").float()
    moe = parallelize_model(copy.deepcopy(alone), make_mesh())
    x = local_part(make_batch()[0]).float().requires_grad_()
    multiplies = mock.patch.object(private_torch, "has_native_matmul", return_value=True)
    with mock.patch.object(exchange.Channel, "transfer", record), multiplies:
        with torch.autocast("cpu", torch.bfloat16):
            out = moe(x)[0]
        out.sum().backward()
    assert sent == [torch.int64] + 4 * [torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        expected = alone(x)[0]
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


# ---- gradients and parameter groups ----


def check_norms() -> None:
    """Norm and clipping over whole, sharded, twice-sharded and placed parameters, for several p."""
    mesh = make_mesh(data_parallel=2)
    for norm_type in (1.0, 2.0, 3.5, float("inf")):
        alone = Model(layers=("top2", "top-k, dropless", "two levels"))
        together = copy.deepcopy(alone)
        parallelize_model(together, mesh, "layers.*.ffn")
        fully_shard(together.layers[2].ffn.experts, mesh=mesh["dp"])
        generator = torch.Generator().manual_seed(7)
        gradients = {name: torch.randn(p.shape, generator=generator) for name, p in alone.named_parameters()}
        for name, parameter in alone.named_parameters():
            parameter.grad = gradients[name].clone()
        for name, parameter in together.named_parameters():
            parameter.grad = shard_like(gradients[name], parameter)
        together.last.weight.grad = alone.last.weight.grad = None
        expected = nn.utils.clip_grad_norm_(alone.parameters(), 1.5, norm_type)
        found = clip_grad_norm_(together, 1.5, norm_type)
        torch.testing.assert_close(found, expected, **TOLERANCE)
        reference = dict(alone.named_parameters())
        for name, parameter in together.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gather_tensor(parameter.grad), reference[name].grad, **TOLERANCE)
    its = [p for p in together.parameters() if isinstance(p, DTensor) and dist.get_rank() == 1]
    for parameter in its:
        parameter.grad.to_local().zero_()  # type: ignore[union-attr]
    norm = clip_grad_norm_(together, 1e9)
    for parameter in its:
        parameter.grad = None
    assert clip_grad_norm_(together, 1e9) == norm  # other ranks do not wait for this one
    together.first.weight.grad.fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"norm of order .* is non-finite"):
        clip_grad_norm_(together, 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="a positive number"):
        clip_grad_norm_(together, 1.0, 0.0)


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value.clone()
    # by way of one process' tensors, so that nothing here depends on how the placements were made
    sharded = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    assert sharded.to_local().shape == parameter.to_local().shape
    return sharded


def check_averages() -> None:
    """Means and sums over a group, of plain and sharded gradients; a missing one counts as 0."""
    mesh, rank = make_mesh(data_parallel=2), dist.get_rank()
    model = parallelize_model(Model(), mesh, "layers.*.ffn")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(rank))
    if rank == 3:
        model.last.weight.grad = None
    average_gradients(replicated_parameters(model).values(), dist.group.WORLD)
    average_gradients(expert_parameters(model).values(), mesh["dp"], op="sum")
    assert torch.all(model.first.weight.grad == 1.5)
    assert torch.all(model.last.weight.grad == 0.75)
    local = model.layers[0].ffn.experts.w1.grad.to_local()
    assert torch.all(local == (2.0 if rank % 2 == 0 else 4.0))


# ---- documentation, bytes that are sent, compilation ----


def run_recipe(code: str, port: int, folder: Path) -> float:
    """A program as a reader would run it with torchrun, in a folder of its own; the last norm of its gradients."""
    place = {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    names: dict[str, Any] = {"__name__": "__main__"}
    with mock.patch.dict(os.environ, place), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, "docs/distributed/expert_parallelism.md", "exec"), names)
    assert names["extra"] == {"step": 2}
    if "dist.broadcast(" in code:
        check_replicas_are_equal(names["model"], names["mesh"]["dp"])
    return round(names["norm"].item(), 5)


def check_replicas_are_equal(model: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in expert_parameters(model).items():
        own = parameter.detach().to_local().contiguous()
        replicas = [torch.empty_like(own) for _ in range(mesh.size())]
        dist.all_gather(replicas, own, group=mesh.get_group())
        assert all(torch.equal(replica, own) for replica in replicas), name


def check_bytes_sent() -> None:
    """At capacity 1.0 exactly the least is sent, at 1.25 a quarter more, and dropless what the router chooses."""
    tokens, dim, ranks = 64, 16, dist.get_world_size()
    least = 2 * dim * 2 * 2 * torch.get_default_dtype().itemsize * (ranks - 1) / ranks  # of a token with two choices
    assert bytes_sent(1.0, tokens, dim) == least
    assert bytes_sent(1.25, tokens, dim) == 1.25 * least
    assert 0.5 * least < bytes_sent(None, tokens, dim) < 1.5 * least


def bytes_sent(factor: float | None, tokens: int, dim: int) -> float:
    """Bytes of rows that leave a rank in a forward and backward, for each token; the mean of the ranks."""
    sent, transfer = torch.zeros(()), exchange.Channel.transfer

    def counted(channel: exchange.Channel, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        if x.is_floating_point():
            sent.add_(x[:1].nbytes * (sum(send) - send[channel.group.rank()]))
        return transfer(channel, x, send, receive)

    torch.manual_seed(0)
    moe = MoE(dim, gate=TopKGating(dim, 8, k=2, capacity_factor_train=factor), experts=Experts(dim, 8, 32))
    parallelize_module(moe, make_mesh()["ep"], ExpertParallel())
    torch.manual_seed(1 + dist.get_rank())
    with mock.patch.object(exchange.Channel, "transfer", counted):
        out, aux_loss = moe(torch.randn(1, tokens, dim, requires_grad=True))
        (out.square().mean() + aux_loss).backward()
    dist.all_reduce(sent)
    return sent.item() / dist.get_world_size() / tokens


class CountingExperts(CustomExperts):
    """They assign a buffer anew, and have a method of a name that routed experts have too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(EXPERTS))

    def compute(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        self.load = self.load + len(x)
        return self.compute(x)


class RecordingExperts(CustomExperts):
    """They note what another thread would see of the layer while their forward runs, and what they are themselves."""

    layers: ClassVar[list[Any]] = []
    seen: ClassVar[list[Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        for experts in (self.layers[0].experts, self):
            self.seen.append((type(experts).__name__, experts.num_experts, len(experts.inner.w1)))
        self.last = len(x)
        return super().forward(x)


def check_batch_invariance_is_rejected() -> None:
    with ops.use("batch_invariant"), pytest.raises(ValueError, match=r"batch_invariant.*sharded experts"):
        parallelize_model(make_layer("top-k, dropless"), make_mesh())(torch.randn(2, LENGTH, DIM))


def check_no_leak_between_calls() -> None:
    """A stand-in holds this rank's experts: the layer itself stays spread, and gets what the forward set."""
    moe = parallelize_model(
        make_top2(experts=RecordingExperts()), make_mesh(), replicated=replicate_layer("own experts")
    )
    RecordingExperts.layers, RecordingExperts.seen = [moe], []
    moe(torch.randn(2, LENGTH, DIM))
    here = len(moe.experts.sharding.local_expert_ids)
    assert RecordingExperts.seen == [
        ("ShardedRecordingExperts", EXPERTS, EXPERTS),
        ("RecordingExperts", here, here),
    ]
    assert moe.experts.last == here
    assert type(moe.experts).__name__ == "ShardedRecordingExperts"
    assert moe.experts.num_experts == len(moe.experts.inner.w1) == EXPERTS


def check_compiles() -> None:
    """With static shapes a layer is one graph, whose numbers are the same; what a forward sets stays there too."""
    x = torch.randn(2, LENGTH, DIM)
    for made, names in (
        (make_layer("top2"), ()),
        (make_top2(experts=CountingExperts()), replicate_layer("own experts")),
    ):
        moe = parallelize_model(made, make_mesh(), static_shapes=True, replicated=names)
        compiled = torch.compile(moe, backend="eager", fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own
            torch.testing.assert_close(compiled(x)[0], moe(x)[0], **TOLERANCE)
        torch._dynamo.reset()
    here = moe.experts.sharding.local_expert_ids
    assert moe.experts.load.unique().tolist() == [0, 2 * len(here)]
    assert moe.experts.load[here.start : here.stop].all()


def check_ddp_keeps_buffers_of_experts() -> None:
    """Each rank updates its own part of a stacked buffer, which DDP must not overwrite with the first rank's."""
    moe = parallelize_model(
        make_top2(experts=CountingExperts()), make_mesh(), replicated=replicate_layer("own experts")
    )
    parallel = DistributedDataParallel(ignore_experts_in_ddp(moe))
    for _ in range(3):
        parallel(torch.randn(2, LENGTH, DIM))[0].sum().backward()
    here = moe.experts.sharding.local_expert_ids
    assert moe.experts.load[here.start : here.stop].tolist() == [3 * len(here)] * len(here)


def check_parameters_of_a_wrapped_model() -> None:
    """Experts are found, and ignored by DDP, even if a wrapper is missing from the names of its parameters."""
    moe = parallelize_model(make_layer("top2"), make_mesh())
    wrapped = checkpoint_wrapper(moe)
    assert set(expert_parameters(wrapped)) == set(expert_parameters(moe)) == {"experts.w1", "experts.w2"}
    assert set(replicated_parameters(wrapped)) == set(replicated_parameters(moe))
    DistributedDataParallel(ignore_experts_in_ddp(wrapped))(torch.randn(2, LENGTH, DIM))[0].sum().backward()


def check_what_is_not_sharded_with_experts() -> None:
    """Parameters that are replicated over all ranks, and experts that are not sharded."""
    moe = parallelize_model(make_layer("top2, own experts"), make_mesh(), replicated=replicate_layer("own experts"))
    message = r"experts' parameters shared_scale are replicated .* pass set\(expert_parameters\(model\).values\(\)\)"
    mesh = make_mesh()["dp"]
    with pytest.raises(ValueError, match=message):
        fully_shard_experts(moe, mesh=mesh)
    moe.experts = checkpoint_wrapper(moe.experts)
    with pytest.raises(ValueError, match="are replicated over the expert-parallel ranks"):
        fully_shard_experts(moe, mesh=mesh)
    with pytest.raises(ValueError, match="the experts, Experts, are not sharded; first call parallelize_module"):
        fully_shard_experts(make_layer("top2"), mesh=mesh)
    assert not any(isinstance(module, FSDPModule) for module in moe.modules())
