"""Models that are built, called or trained in less usual ways, and what they must not be: wrong, or stuck."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import Experts, MoE, TopKGating
from mixture_of_experts.parallel import (
    ExpertParallel,
    average_gradients,
    clip_grad_norm_,
    parallelize_module,
    replicated_parameters,
)
from support.checkpoint_recipe import list_checkpoints, load_checkpoint, save_checkpoint
from support.parallel_checks import (
    TOLERANCE,
    check_same_counts,
    check_same_gradients,
    check_same_losses,
    make_mesh,
    parallelize_model,
    record_losses,
)
from support.parallel_layers import (
    BATCH,
    DIM,
    EXPERTS,
    HIDDEN,
    LAYERS,
    LENGTH,
    CustomExperts,
    Model,
    local_part,
    make_batch,
    make_layer,
    make_model,
    make_top2,
    replicate_layer,
)
from support.parallel_training import KEY, LAYOUTS, make_batches, make_optimizer
from support.parallel_workers import gather_tensor

Call = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def call_layer(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return layer(x)


def check_against_single_process(
    alone: nn.Module, together: nn.Module, run: Call = call_layer, inputs_need_gradient: bool = True
) -> None:
    """Outputs and gradients of `run` are those of one process."""
    x, world = make_batch()[0], dist.get_world_size()
    x_alone, x_own = (part.clone().requires_grad_(inputs_need_gradient) for part in (x, local_part(x)))
    out_alone, aux_alone = run(alone, x_alone)
    (out_alone.square().mean() + aux_alone).backward()
    out, aux = run(together, x_own)
    (out.square().sum() * world / x.numel() + aux).backward()
    torch.testing.assert_close(out, local_part(out_alone), **TOLERANCE)
    if inputs_need_gradient:
        torch.testing.assert_close(x_own.grad / world, local_part(x_alone.grad), **TOLERANCE)
    check_same_gradients(together, alone, make_mesh())


# ---- experts of several kinds ----


class TiedExperts(nn.Module):
    """One stack under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.there = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) / 3)
        self.back = self.there

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, self.there).tanh(), self.back)


def check_tied_experts() -> None:
    """A parameter with two names is one parameter on every rank too, and loads."""
    alone = make_top2(experts=TiedExperts())
    together = parallelize_model(copy.deepcopy(alone), make_mesh())
    assert together.experts.there is together.experts.back
    state = {name: 2 * value for name, value in alone.state_dict().items()}
    for layer in (alone, together):
        layer.load_state_dict(state)
    for name, value in together.state_dict().items():
        assert torch.equal(gather_tensor(value), state[name]), name
    check_against_single_process(alone, together)


class ScaledExperts(CustomExperts):
    """A buffer `(d,)` that all experts share and that, with d = e, looks like a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.linspace(1, 2, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gain)


HALF_DTYPES = dict(rtol=0.03, atol=0.03)


class PlainExperts(nn.Module):
    """Stacked experts inside a module of one's own, which returns what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.inner = Experts(DIM, EXPERTS, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def dtype_layer(experts: object, capacity: float | None) -> MoE:
    """A layer in float32 with an expert to which nobody goes."""
    gate = TopKGating(DIM, EXPERTS, capacity_factor_train=capacity, capacity_factor_eval=capacity)
    return MoE(DIM, gate=gate, experts=experts).float()  # type: ignore[arg-type]


def check_experts_that_return_other_dtypes() -> None:
    """Under autocast experts of one's own return bfloat16; one rank alone may be under it."""
    torch.manual_seed(1)
    for autocast in (True, dist.get_rank() == 0):
        for capacity in (None, 2.0):
            alone = dtype_layer(PlainExperts(), capacity)
            together = parallelize_model(copy.deepcopy(alone), make_mesh())
            x = make_batch()[0].float()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = together.eval()(local_part(x))[0]
                torch.testing.assert_close(out, local_part(alone.eval()(x)[0]), **HALF_DTYPES)
            x_alone, x_own = x.clone().requires_grad_(), local_part(x).clone().requires_grad_()
            for layer, tokens in ((alone.train(), x_alone), (together.train(), x_own)):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    out = layer(tokens)[0]
                assert out.dtype == torch.float32
                out.square().mean(-1).sum().backward()
            torch.testing.assert_close(x_own.grad, local_part(x_alone.grad), **HALF_DTYPES)


class RememberingExperts(CustomExperts):
    """Experts that set attributes, and assign buffers anew, in their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("load", torch.zeros(EXPERTS))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last_shape = x.shape
        self.steps = self.steps + 1
        self.load = self.load + x.abs().sum(dim=-1).gt(0).sum(dim=-1)
        self.inner.note = f"call {self.seen}"
        return super().forward(x)


def check_attributes_set_in_a_forward() -> None:
    """They stay, as in one process, those of parts and those with an entry for each expert too."""
    alone = make_top2(experts=RememberingExperts())
    together = parallelize_model(copy.deepcopy(alone), make_mesh(), replicated=["shared_scale"])
    for _ in range(2):
        alone(make_batch()[0])
        together(local_part(make_batch()[0]))
    for layer in (alone, together):
        experts = layer.experts
        assert (experts.seen, experts.steps, experts.inner.note) == (2, 2, "call 2")
        assert experts.num_experts == EXPERTS
    assert together.experts.last_shape[0] == EXPERTS // dist.get_world_size()
    here = together.experts.sharding.local_expert_ids
    expected = torch.zeros(EXPERTS)
    expected[here.start : here.stop] = alone.experts.load[here.start : here.stop]
    assert torch.equal(together.experts.load, expected)


def check_attributes_set_beside_a_forward() -> None:
    """What another thread sets on the layer while a forward runs stays: here a hook sets it within the forward."""
    together = parallelize_model(make_top2(experts=RememberingExperts()), make_mesh(), replicated=["shared_scale"])
    whole = together.experts
    whole.changed = "before"

    def beside(*_: object) -> None:
        whole.changed, whole.attached = "after", True

    whole.inner.register_forward_hook(beside)
    together(local_part(make_batch()[0]))
    assert (whole.changed, whole.attached, whole.seen) == ("after", True, 1)


def check_pickling_says_what_to_do() -> None:
    layer = parallelize_model(make_layer("top2"), make_mesh())
    for pickled in (layer, nn.ModuleDict({"ffn": layer})):
        for write in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
            with pytest.raises(TypeError, match=r"holds only some of its .* with torch\.distributed\.checkpoint, or"):
                write(pickled)
    assert repr(copy.deepcopy(layer.experts)) == repr(layer.experts)


def check_buffer_that_looks_stacked() -> None:
    alone = make_top2(experts=ScaledExperts())
    check_against_single_process(
        alone, parallelize_model(copy.deepcopy(alone), make_mesh(), replicated=["shared_scale", "gain"])
    )
    parallelize_model(
        make_top2(experts=CustomExperts()), make_mesh(), replicated="shared_scale"
    )  # a name alone will do


# ---- calls ----


def call_twice(layer: nn.Module, x: Tensor, reentrant: bool | None = None) -> tuple[Tensor, Tensor]:
    """One layer called two times in a forward, recomputed in the backward or not."""
    run = layer if reentrant is None else partial(checkpoint, layer, use_reentrant=reentrant)
    first, aux_first = run(x)
    second, aux_second = run(x + first)
    return first + second.sin(), aux_first + aux_second


def check_layer_called_twice() -> None:
    """Also under checkpointing of either kind; the plan may name a layer by each of its places."""
    for name in ("top2", "top-k, deepseek", "top-k, dropless batch"):
        for reentrant in (None, False, True):
            alone = make_layer(name)
            layer = copy.deepcopy(alone)
            places = nn.ModuleList(nn.ModuleDict({"ffn": layer}) for _ in range(2))
            parallelize_model(places, make_mesh(), "*.ffn")
            check_against_single_process(alone, layer, partial(call_twice, reentrant=reentrant))
            check_same_counts(layer, alone)


def check_calls_without_gradients() -> None:
    for name in ("top-k, dropless", "top-k, score priority", "two levels, mixed"):
        alone = make_layer(name).eval()
        together = parallelize_model(copy.deepcopy(alone), make_mesh())
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                out = together(local_part(make_batch()[0]))[0]
                torch.testing.assert_close(out, local_part(alone(make_batch()[0])[0]), **TOLERANCE)
            assert not out.requires_grad


def check_calls_without_any_token() -> None:
    """No rank has a token: gradients of 0, not of nothing."""
    for name in LAYERS:
        moe = parallelize_model(make_layer(name), make_mesh(), replicated=replicate_layer(name))
        for shape in ((0, LENGTH, DIM), (2, 0, DIM)):
            out, aux = moe(torch.zeros(shape, requires_grad=True))
            (out.sum() + aux).backward()
        for parameter_name, parameter in moe.named_parameters():
            assert torch.all(gather_tensor(parameter.grad) == 0), (name, parameter_name)


def check_rank_with_sequences_of_no_length() -> None:
    """Groups without a token count for nothing, in neither level: losses are those of the other rank alone."""
    x = make_batch()[0]
    levels = ("two levels", "two levels, mixed", "two levels, dropless", "two levels, dropless first")
    for name in ("top2", "top-k, dropless", "top-k, score priority", *levels):
        for group_size, nothing in ((None, x[:2, :0]), (LENGTH, x[:2, :0]), (LENGTH, x[:0])):
            alone = make_layer(name)
            alone.group_size = group_size
            together = parallelize_model(copy.deepcopy(alone), make_mesh())
            with record_losses(alone) as losses_alone, record_losses(together) as losses:
                alone(x)
                together(x if dist.get_rank() == 0 else nothing)
            check_same_losses(losses, losses_alone)


def check_second_derivatives() -> None:
    for name in ("top-k, dropless", "two levels"):
        alone = make_layer(name)
        together = parallelize_model(copy.deepcopy(alone), make_mesh())
        found = []
        for layer, x in ((together, local_part(make_batch()[0])), (alone, make_batch()[0])):
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
            gradient.square().sum().backward()
            found.append(x.grad)
        torch.testing.assert_close(found[0], local_part(found[1]), **TOLERANCE)


# ---- setting up ----


def check_refusals_change_nothing() -> None:
    """A plan of which one layer is wrong leaves all as they are."""
    mesh = make_mesh()["ep"]
    model = Model(layers=("top2", "top2"))
    before = repr(model), list(model.state_dict())
    wrong = {
        "layers.1.ffn: 5 experts cannot be divided": MoE(DIM, 5),
        r"layers.0.ffn: replicated contains \['gain'\]": make_layer("top2"),
        "layers.1.ffn .* has the same experts as layers.0.ffn": MoE(DIM, EXPERTS, experts=model.layers[0].ffn.experts),
    }
    for message, layer in wrong.items():
        replicated = ["gain"] if "gain" in message else []
        model.layers[1].ffn = layer
        with pytest.raises(ValueError, match=message):
            parallelize_module(model, mesh, {KEY: ExpertParallel(replicated=replicated)})
        model.layers[1].ffn = make_layer("top2")
        assert (repr(model), list(model.state_dict())) == before
        assert model.layers[0].ffn.gate.process_group is None
    with pytest.raises(ValueError, match=r"layers.0.ffn \(by 'layers.0.ffn'\) has the same experts as layers.0.ffn"):
        parallelize_module(model, mesh, {KEY: ExpertParallel(), "layers.0.ffn": ExpertParallel()})
    assert (repr(model), list(model.state_dict())) == before


def check_more_refusals() -> None:
    mesh = make_mesh()["ep"]
    sharded = make_layer("top2")
    fully_shard(sharded.experts, mesh=mesh)
    with pytest.raises(ValueError, match=r"experts.w1 is already a DTensor; apply ExpertParallel before"):
        parallelize_module(sharded, mesh, ExpertParallel())
    for group, error in (
        ("dp", "batch_group must be .* 1-D DeviceMesh, got 'dp'"),
        (make_mesh(), "1-D mesh, but got a 2-D mesh with dim"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            ExpertParallel(batch_group=group)
    with pytest.raises(ValueError, match="op must be one of 'mean', 'sum', got 'max'"):
        average_gradients([], mesh, op="max")


# ---- gradients ----


def check_counts_under_ddp() -> None:
    """DDP leaves the counts of chosen experts alone, also where it synchronises at every piece of a batch."""
    alone, model = make_model(), make_model()
    parallel, _ = LAYOUTS["ddp"](model)
    for x, _ in make_batches(0, 3):
        for run, tokens in ((alone, x), (parallel, local_part(x))):
            out, aux = run(tokens)
            (out.sum() + aux).backward()
    counts = model.layers[1].ffn.gate.expert_counts.clone()
    dist.all_reduce(counts)
    assert torch.equal(counts, alone.layers[1].ffn.gate.expert_counts)


def check_gradients_that_are_not_there() -> None:
    """Frozen parameters and those that no rank used get none, so that weight decay does not reach them."""
    model = Model()
    model.unused, model.used_here = nn.Linear(2, 2), nn.Linear(DIM, DIM)
    model.first.requires_grad_(False)
    parallelize_model(model, make_mesh(), KEY)
    out, aux = model(local_part(make_batch()[0]))
    (out.sum() + aux).backward()
    if dist.get_rank() == 0:
        model.used_here(torch.ones(BATCH, DIM)).sum().backward()
    average_gradients(replicated_parameters(model).values(), dist.group.WORLD)
    assert model.first.weight.grad is None
    assert model.unused.weight.grad is None
    assert torch.all(model.used_here.bias.grad == BATCH / dist.get_world_size())
    model.first.requires_grad_(True)
    assert clip_grad_norm_(model, 1.0) > 0


def check_norm_of_parameters_without_gradients() -> None:
    for norm_type in (2.0, float("inf")):
        assert clip_grad_norm_(parallelize_model(Model(), make_mesh(), KEY), 1.0, norm_type) == 0


# ---- checkpoints ----


def check_what_is_kept(folder: Path) -> None:
    """The last two steps; and what is written also where the folder has later steps, of a run that was given up."""
    model = nn.Linear(2, 2)
    for steps, kept in (
        ((9, 10, 11, 1_000_000_000), ["step-000000011", "step-1000000000"]),
        ((8, 9, 4), ["step-000000004", "step-000000008", "step-000000009"]),
    ):
        run = folder / str(len(steps))
        for step in steps:
            assert save_checkpoint(run, model, make_optimizer(model), step=step, extra={}, keep=2).exists()
        dist.barrier()
        assert [path.name for path in list_checkpoints(run)] == kept
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_checkpoint(folder / "nowhere", model, make_optimizer(model))


def check_extra_that_could_not_be_read(folder: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(pickle.UnpicklingError, match=r"Unsupported global: GLOBAL pathlib"):
        save_checkpoint(folder, model, make_optimizer(model), step=1, extra={"step": 1, "path": Path})
    assert not list(folder.iterdir())


def check_same_step_again(folder: Path) -> None:
    """A save over an earlier one of the same step: killed before the last renaming, it leaves the earlier one."""
    model, rename = nn.Linear(2, 2), Path.rename
    optimizer = make_optimizer(model)
    save_checkpoint(folder, model, optimizer, step=4, extra={"try": 1})

    def die(path: Path, target: Path) -> None:
        if target.name == "step-000000004":
            raise KeyboardInterrupt
        rename(path, target)

    with mock.patch.object(Path, "rename", die), pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, model, optimizer, step=4, extra={"try": 2})
    assert load_checkpoint(folder, model, optimizer) == {"try": 1}
    save_checkpoint(folder, model, optimizer, step=4, extra={"try": 3})
    assert load_checkpoint(folder, model, optimizer) == {"try": 3}
    assert [path.name for path in folder.iterdir()] == ["step-000000004"]
