"""The layers on fake CUDA tensors: devices, dtypes, host syncs, and what a call costs there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import fake_cuda
import pytest

pytestmark = pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))
ROUTERS = ["top 2", "top 2, by score", "switch", "top 3", "top 3, by token", "top 3 of groups", "noisy"]
CARDS = {"A100": (8, 0), "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0), "RTX 5090": (12, 0)}


class Checks:
    """Runs functions of `fake_cuda_checks` in the process where CUDA is faked."""

    def __init__(self, process: ProcessPoolExecutor) -> None:
        self.process = process

    def __call__(self, name: str, *args, **kwargs):
        return self.process.submit(run, name, args, kwargs).result(timeout=300)


def run(name: str, args, kwargs):
    import warnings

    warnings.simplefilter("error")
    import fake_cuda_checks  # it imports torch: only in the process that has loaded fake CUDA

    return getattr(fake_cuda_checks, name)(*args, **kwargs)


@pytest.fixture(scope="module")
def check() -> Iterator[Checks]:
    with fake_cuda.fake_cuda() as process:
        yield Checks(process)


def test_a_sync_and_a_wrong_device_are_seen(check: Checks):
    check("check_sync_is_seen")


@pytest.mark.parametrize("capacity", [None, 1.0], ids=["dropless", "capacity"])
@pytest.mark.parametrize("router", [*ROUTERS, "expert choice", "two levels"])
def test_routers(check: Checks, router: str, capacity: float | None):
    for masked in (False, True):
        check("check_layer", router, "gated", capacity, masked=masked)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64"])
@pytest.mark.parametrize("experts", ["plain", "gated", "gated with biases"])
def test_dtypes(check: Checks, experts: str, dtype: str):
    for capacity in (None, 1.25):
        check("check_layer", "top 3", experts, capacity, dtype)


@pytest.mark.parametrize("router", ["top 2", "expert choice", "two levels"])
def test_autocast(check: Checks, router: str):
    check("check_layer", router, "plain", None, "f32", autocast=True, masked=True)


@pytest.mark.parametrize("capability", CARDS.values(), ids=CARDS)
def test_cards(check: Checks, capability: tuple[int, int]):
    for dtype in ("bf16", "f32"):
        check("check_layer", "top 3", "gated", None, dtype, capability=capability)


def test_statistics(check: Checks):
    check("check_statistics")
