"""Which of torch's private names a new version of torch breaks: each is asked here for what it is used for."""

import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.flop_counter import FlopCounterMode

from mixture_of_experts.ops import int4, int8
from mixture_of_experts.support import private_torch

#: importing the package must not load these: each takes a tenth of a second or more, or is an extra
HEAVY_MODULES = (
    *("torch._dynamo", "torch._inductor", "sympy", "torch.fx.experimental.symbolic_shapes", "torch.distributed.tensor"),
    *("torch.utils.flop_counter", "triton"),
    *("transformers", "matplotlib", "numpy.testing", "mixture_of_experts.parallel", "mixture_of_experts.huggingface"),
    "mixture_of_experts.stats",
)


@pytest.mark.slow
def test_assert_in_graph():
    checked = torch.compile(
        lambda x: private_torch.assert_in_graph(x.sum() > 0, "below") or x + 1, fullgraph=True, backend="aot_eager"
    )
    assert checked(torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="below"):
        checked(-torch.ones(2))


def test_importing_the_package_loads_nothing_heavy():
    code = "import torch, sys; before = set(sys.modules); import mixture_of_experts; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mixture_of_experts.moe" in loaded
    assert not [module for module in loaded if module.startswith(HEAVY_MODULES)]


def test_conditions_on_sizes():
    assert private_torch.statically_known_true(2 > 1)
    assert not private_torch.statically_known_true(1 > 2)
    answers = []

    def double(x):
        answers.append((private_torch.statically_known_true(x.shape[0] > 3), private_torch.is_exporting()))
        return x * 2

    torch.export.export(_Function(double), (torch.ones(4),))
    torch.export.export(_Function(double), (torch.ones(4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert answers[0] == (True, True)
    assert answers[-1] == (False, True)
    assert not private_torch.is_exporting()


def test_fake_tensors_are_detected():
    assert not private_torch.is_fake_tensor(torch.ones(2))
    with FakeTensorMode():
        assert private_torch.is_fake_tensor(torch.ones(2))


def test_flop_counters_are_registered():
    with FlopCounterMode(display=False) as counter:
        private_torch.register_flop_formula(torch.ops.aten.add, lambda *_, **__: 7)
        torch.ones(2).add(1)
    assert counter.get_total_flops() == 7


def test_packed_rows():
    """Where they are right, `mixture_of_experts.ops.int8` uses them."""
    packed = int8.pack_matrix(torch.randn(6, 5))["packed"]
    numbers = int8.unpack_matrix(packed.unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(private_torch.unpack_rows(packed), numbers)
    place, start, factor = torch.tensor([4, 0, 5]), torch.tensor([0, 2]), torch.tensor([2.0, -1.0, 0.5])
    rows = numbers[place] * factor.unsqueeze(-1)
    found = private_torch.sum_packed_rows(packed, place, start, factor)
    torch.testing.assert_close(found, torch.stack([rows[:2].sum(0), rows[2]]))


@pytest.mark.parametrize("group", int4.GROUP_SIZES)
def test_products_of_int4(group):
    """Where they are right, `mixture_of_experts.ops.int4` uses them."""
    levels, x = torch.randint(16, (48, 512), dtype=torch.int32), torch.randn(3, 512).bfloat16()
    numbers = torch.randn(512 // group, 48, 2).bfloat16()
    step, zero = numbers.float().repeat_interleave(group, dim=0).unbind(-1)
    found = private_torch.multiply_int4(x, private_torch.pack_int4(levels), group, numbers)
    wanted = x.float() @ ((levels.mT - 8) * step + zero)
    assert (found - wanted).norm() <= 5e-3 * wanted.norm()


def test_dispatch_modes():
    with FakeTensorMode(), private_torch.disable_dispatch_modes():
        assert not private_torch.is_fake_tensor(torch.ones(2))


class _Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_transforms():
    assert not private_torch.is_in_transform()
    seen = []

    def function(x):
        seen.append(private_torch.is_in_transform())
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    assert seen == [True]


def test_forward_mode():
    """Of a transform, also around another one, and of dual tensors; not of other transforms."""
    seen = []

    def function(x):
        seen.append(private_torch.is_in_forward_mode())
        return x.sum()

    x = torch.ones(2)
    torch.func.jvp(function, (x,), (x,))
    torch.func.jacfwd(torch.func.grad(function))(x)
    with torch.autograd.forward_ad.dual_level():
        function(x)
    assert seen == [True] * 3
    torch.func.vmap(torch.func.grad(function))(torch.ones(2, 2))
    function(x)
    assert seen[3:] == [False] * 2


def test_batched_gradients():
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(private_torch.is_functorch_wrapped(grad))
            return grad

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Watched.apply(x), x, torch.eye(2), is_grads_batched=True)
    assert seen == [True]
    assert not private_torch.is_functorch_wrapped(x)


def test_constants_in_graphs():
    @private_torch.assume_constant_result
    def unreadable():
        return len(sys.argv) and 3

    compiled = torch.compile(lambda x: x * unreadable(), fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)) == 3


def test_returns_new_tensor():
    x = torch.arange(4.0, requires_grad=True)
    own = private_torch.unsafe_view(x * 1, (2, 2))
    assert not own._is_view()
    own += 1


def test_wrapper_subclasses():
    from torch.testing._internal.two_tensor import TwoTensor

    assert private_torch.is_wrapper_subclass(TwoTensor(torch.ones(1), torch.ones(1)))
    assert not private_torch.is_wrapper_subclass(torch.ones(1))


def test_process_groups():
    assert private_torch.find_process_group("no such group") is None
    dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
    try:
        group = dist.group.WORLD
        assert group is not None
        assert private_torch.find_process_group(group.group_name) is group
        assert private_torch.all_reduce_sum(torch.ones(2), group).shape == (2,)
        assert private_torch.all_to_all(torch.ones(4, 1), [1, 2], [3, 1], group).shape == (3, 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), checkpoint_wrapper])
def test_wrapped_modules(wrap):
    module = nn.Linear(1, 1)
    assert private_torch.get_wrapped_module(wrap(module)) is module
    assert private_torch.get_wrapped_module(module) is None


class Inner(nn.Module):
    def forward(self, x):
        return x + 1


class Decorated(Inner):
    forward = torch.compile(Inner.forward, backend="eager")


def compile_in_place(forward_alone: bool) -> nn.Module:
    module = Inner()
    if forward_alone:
        module.forward = torch.compile(module.forward, backend="eager")
    else:
        module.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(Inner(), backend="eager"),
        lambda: compile_in_place(True),
        lambda: compile_in_place(False),
        Decorated,
    ],
)
def test_uncompiled_context_runs_eagerly(make):
    """Within the context; before and after it in graphs, which is seen at a flag."""
    seen, model = [], nn.Sequential(nn.Sequential(make()), nn.ReLU())
    inner = private_torch.unwrap_module(model[0][0])
    before = [dict(vars(module)) for module in model.modules()]
    with private_torch.disable_compilation(model):
        handle = inner.register_forward_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
        assert model(torch.ones(2)).tolist() == [2, 2]
        handle.remove()
    assert seen == [False]
    assert [vars(module).keys() for module in model.modules()] == [those.keys() for those in before]
    for module, those in zip(model.modules(), before, strict=True):
        assert all(vars(module).get(name) is those.get(name) for name in ("forward", "_compiled_call_impl"))


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks(register):
    module = nn.GELU()
    assert not private_torch.has_hooks(module)
    getattr(module, f"register_{register}")(lambda *_: None)
    assert private_torch.has_hooks(module)


def test_backwards_have_numbers():
    """Each its own, also one within another; outside of them there is none."""
    seen = [private_torch.get_backward_id()]
    x = torch.ones((), requires_grad=True)

    def within(grad):
        seen.append(private_torch.get_backward_id())
        with torch.enable_grad():
            y = x * 2
            y.register_hook(lambda grad: seen.append(private_torch.get_backward_id()))
            torch.autograd.grad(y, x)

    y = x * 3
    y.register_hook(within)
    y.backward()
    seen.append(private_torch.get_backward_id())
    assert seen[0] == seen[-1] == -1
    assert len(set(seen)) == 3


class SeesDDP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("counts", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return self.linear(x), private_torch.is_in_ddp()


def test_the_ddp_whose_forward_runs(one_process):
    """What it copies before forwards is tested with two processes, in test_balancing.py."""
    model = SeesDDP()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        ddp: Any = nn.parallel.DistributedDataParallel(model)
    assert ddp(torch.ones(1))[1]
    assert not model(torch.ones(1))[1]
    assert ddp.broadcast_buffers
    assert list(ddp.named_module_buffers) == ["counts"]
    assert not ddp.find_unused_parameters
    assert not ddp._join_config.enable
    ddp.parameters_to_ignore = {*ddp.parameters_to_ignore, "counts"}
    ddp._assign_modules_buffers()
    assert not ddp.named_module_buffers
    assert not ddp.will_sync_module_buffers()
    assert private_torch.exclude_from_ddp_broadcast(("counts",), False) == []  # no forward is running


def test_ddp_ignores_counts(tmp_path):
    model = nn.Linear(1, 1)
    private_torch.ignore_in_ddp(model, ["bias"])
    private_torch.ignore_in_ddp(model, ["weight"])
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        with pytest.raises(RuntimeError, match="not needed when a module doesn't have any parameter that requires a"):
            nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()
