"""The CUDA path never waits for the device: proved without a GPU, and shown on one where there is one.

Fake and meta tensors have no values, so an operator that reads one on the host (`item`, `tolist`, `nonzero`, a boolean
index) raises. In both captures here tensors claim to be on CUDA, so that every branch for CUDA is walked, forward and
backward. The second, on the meta device, also shows copies between host and device, which wait too. (Fake tensors on
the CUDA device itself need a torch built for it.)
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.layer_variants import (
    DIM,
    LAYER_VARIANTS,
    MASKED,
    ROUTERS,
    compute_gradients,
    make_layer_with_router,
    run_layer,
)
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_SYNC = "no host sync on CUDA, forward and backward (captures without a GPU)"
gpu_needed = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
paths = pytest.mark.parametrize("path", LAYER_VARIANTS, ids=str)


class RecordOperators(TorchDispatchMode):
    """The names of all operators, and of those whose tensors are on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.between_devices: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        self.names.add(operator.overloadpacket.__name__)
        # a number is wrapped in a 0-dim CPU tensor and passed with the launch
        if len({tensor.device.type for tensor in tensors if tensor.ndim or tensor.device.type != "cpu"}) > 1:
            self.between_devices.add(str(operator))
        return result


def reads_counts(path):
    """Dropless lists make the one host sync that the documentation speaks of."""
    return path.experts == "ExpertList" and path.capacity == "dropless"


@pytest.fixture
def claim_cuda(monkeypatch):
    """All tensors say that they are on CUDA, on a card with a grouped product."""
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))


def capture_graph(build, path=MASKED, dtype=torch.float32, device="cpu"):
    """The operators of forward and backward, on tensors without values."""
    x, mask = path.inputs()
    without_values = FakeTensorMode() if device == "cpu" else nullcontext()
    torch.set_default_dtype(dtype)
    with torch.device(device), without_values:
        layer = build()
        x = torch.empty(x.shape, requires_grad=True)
        mask = None if mask is None else torch.empty(mask.shape, dtype=torch.bool)
        with RecordOperators() as record:
            results = layer(x, mask=mask)
            compute_gradients(layer, x, results)
    assert {result.device.type for result in results} == {device}
    return record


@pytest.mark.slow
@pytest.mark.feature(NO_SYNC)
@pytest.mark.usefixtures("claim_cuda")
@pytest.mark.parametrize(("training", "dtype"), [(True, torch.bfloat16), (False, torch.float32)], ids=str)
@paths
def test_captures(path, training, dtype, limit):
    def build():
        return path.build().train(training)

    if reads_counts(path):
        with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
            capture_graph(build, path, dtype)
        limit("`ExpertList` reads the token count of each module once per call")
        return
    record = capture_graph(build, path, dtype)
    kernel = path.experts in ("Experts", "GatedExperts") and path.capacity == "dropless" and dtype == torch.bfloat16
    assert ("_grouped_mm" in record.names) == kernel  # the branches for CUDA were taken
    assert capture_graph(build, path, dtype, "meta").between_devices == set()


@pytest.mark.slow
@pytest.mark.feature(NO_SYNC)
@pytest.mark.usefixtures("claim_cuda")
@pytest.mark.parametrize("router", ROUTERS)
def test_captures_of_routers(router):
    assert "bmm" in capture_graph(lambda: make_layer_with_router(router)).names
    assert capture_graph(lambda: make_layer_with_router(router), device="meta").between_devices == set()


class SyncingModule(torch.nn.Linear):
    """Waits for the device in some way."""

    def __init__(self, wait) -> None:
        super().__init__(DIM, DIM)
        self.wait = wait

    def forward(self, x, mask=None):
        return self.wait(x), x.sum()


def test_captures_detect_syncs():
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        capture_graph(lambda: SyncingModule(lambda x: x * x.sum().item()))
    with pytest.raises(DynamicOutputShapeException, match=r"aten\.nonzero"):
        capture_graph(lambda: SyncingModule(lambda x: x + x[x > 0].sum()))
    record = capture_graph(
        lambda: SyncingModule(lambda x: x + torch.arange(DIM, device="cpu").to(x.device)), device="meta"
    )
    assert record.between_devices == {"aten._to_copy.default"}


def run_on_gpu(path, dtype):
    layer = path.build().to("cuda", dtype)
    return layer, *path.inputs(dtype=dtype, device="cuda")


@pytest.mark.feature('`torch.cuda.set_sync_debug_mode("error")`, forward and backward')
@gpu_needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@paths
def test_sync_debug_mode(path, dtype, limit):
    layer, x, mask = run_on_gpu(path, dtype)
    compute_gradients(layer, x, run_layer(layer, x, mask))  # libraries set themselves up in a first call
    torch.manual_seed(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        if reads_counts(path):
            with pytest.raises(RuntimeError, match="synchroniz"):
                layer(x, mask=mask)
            limit("`ExpertList` reads the token count of each module once per call")
        else:
            compute_gradients(layer, x, layer(x, mask=mask))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.feature("CUDA graphs, forward and backward")
@gpu_needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@paths
def test_cuda_graph(path, dtype, limit):
    if reads_counts(path):
        limit("`ExpertList` reads the token count of each module once per call")
        return
    layer, x, mask = run_on_gpu(path, dtype)
    layer.eval()
    for gate in (module for module in layer.modules() if hasattr(module, "second_policy_eval")):
        gate.second_policy_eval = "all"  # the replayed draws of policy random are not those of another call
    static = x.detach().clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the warm-up that capture asks for
        for _ in range(3):
            compute_gradients(layer, static, layer(static, mask=mask))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, aux_loss = layer(static, mask=mask)
        grads = compute_gradients(layer, static, (out, aux_loss))
    fresh, _ = path.inputs(seed=7, dtype=dtype, device="cuda")
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    expected = layer(fresh, mask=mask)
    torch.testing.assert_close((out, aux_loss), expected)
    torch.testing.assert_close(grads, compute_gradients(layer, fresh, expected))
