"""The bits of a layer's call: digests of all that it returns and leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import Phase, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support import configurations as matrix
from tests.support import layer_variants
from tests.support.configurations import Bank, Configuration, Router  # noqa: F401  (in situations)

from .outcomes import Digests, Outcomes, Uncomputed, failed
from .renames import with_old_keys
from .sides import Sides


@dataclass(frozen=True)
class Situation:
    """A configuration of the matrix, and what that leaves open."""

    layer: Configuration
    threads: int = 1
    gradients: bool = True
    reentrant: bool = False  # checkpointing of the layer, where there is one

    def __str__(self) -> str:
        return repr(self)


def digest(tensor: Tensor) -> str:
    """Of dtype, shape and every bit."""
    tensor = tensor.detach().cpu().contiguous()
    content = tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + content).hexdigest()[:16]


def digests(situation: str) -> Digests:
    """What a call of the layer returns, its gradients, its buffers and the generator afterwards; or the type of an
    error."""
    case: Situation = eval(with_old_keys(situation), dict(globals()))  # in this tree's names, as this file is
    try:
        layer, call = matrix.build_layer(case.layer), matrix.make_call(case.layer)
        with threads(case.threads), as_checkpointed(case):
            found = run(case, layer, call)
    except Exception as error:
        return failed(error)
    found |= {f"buffer {name}": digest(buffer) for name, buffer in layer.named_buffers()}
    return found | {"generator": digest(torch.default_generator.get_state())}


def run(case: Situation, layer: nn.Module, call: matrix.Call) -> Digests:
    if not case.gradients:
        with torch.no_grad():
            return of_results(matrix.run_layer(case.layer, layer, call))
    return of_results(matrix.run_layer(case.layer, layer, call))


def of_results(results: matrix.Results) -> Digests:
    grads = {f"gradient of {name}": digest(grad) for name, grad in results.grads.items()}
    return {"out": digest(results.out), "aux_loss": digest(results.aux_loss), **grads}


@contextlib.contextmanager
def as_checkpointed(case: Situation) -> Iterator[None]:
    """Both kinds of checkpointing: the matrix has the one that is not reentrant."""

    def reentrant(function: Any, *args: Any, use_reentrant: bool, **kwargs: Any) -> Any:
        return checkpoint(lambda *tensors: function(*tensors, **kwargs), *args, use_reentrant=True)

    before = matrix.checkpoint
    matrix.checkpoint = reentrant if case.reentrant else before
    try:
        yield
    finally:
        matrix.checkpoint = before


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def routers() -> list[str]:
    return list(layer_variants.ROUTERS)


def digests_of_router(name: str, variant: str, training: bool, length: int) -> Digests:
    """Those of a layer with a router by name, which the matrix has not all."""
    layer, path = (
        layer_variants.make_layer_with_router(name),
        layer_variants.LayerVariant("MoE", "Experts", "dropless", variant),
    )
    layer.train(training)
    layer.group_size = 5 if variant == "grouped" else None
    x, mask = path.inputs(2, length)
    try:
        results = layer_variants.run_layer(layer, x, mask)
        found = {
            f"gradient of {n}": digest(grad) for n, grad in layer_variants.compute_gradients(layer, x, results).items()
        }
    except Exception as error:
        return failed(error)
    found |= {"out": digest(results[0]), "aux_loss": digest(results[1])}
    found |= {f"buffer {n}": digest(buffer) for n, buffer in layer.named_buffers()}
    return found | {"generator": digest(torch.default_generator.get_state())}


# Drawing


@st.composite
def situations(draw: Any) -> Situation:
    """Layers of the matrix, as small as there or so large that every way has something to choose."""
    layer: Configuration = draw(matrix.configurations())
    gradients = draw(st.integers(0, 3)) != 3
    kind = draw(st.sampled_from(["large", "small", "decoding"]))
    if kind == "large":
        shape = (*layer.shape[:-1], draw(st.sampled_from([1, 2, 17, 64, 200, 5])))
        dim, hidden = draw(st.sampled_from([(64, 96), (256, 320), (32, 200)]))
        layer = replace(layer, dim=dim, bank=replace(layer.bank, hidden_dim=hidden), shape=shape)
    elif kind == "decoding":  # few tokens in eval, whose experts are worth ways of their own
        shape, gradients = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (9, 1), (1, 17)])), False
        layer = replace(layer, dim=256, bank=replace(layer.bank, hidden_dim=320), shape=shape, training=False)
        layer = replace(layer, implementation=draw(st.sampled_from(["auto", layer.implementation])), checkpointing=None)
    reentrant = layer.checkpointing == "layer" and draw(st.booleans())
    return Situation(layer, draw(st.sampled_from([1, 1, 2])), gradients, reentrant)


def compare(both: Sides, examples: int) -> str | None:
    """Ask both sides about so many situations, and about every router by name that both have. Returns the smallest
    situation in which they differ, or None."""
    from tests.support.matrix import independent_examples, seed_examples  # this tree's: an earlier commit lacks it

    found: list[str] = []
    outcomes = Outcomes()

    def ask(function: str, *arguments: Any) -> None:
        if names := outcomes.compare(", ".join(map(str, arguments)), *both.ask(f"bits.{function}", *arguments)):
            found[:] = [f"{', '.join(names)} differ in\n    {', '.join(map(str, arguments))}"]
            raise AssertionError

    @seed_examples(0, examples, Phase.shrink)
    @given(situations())
    def equal(situation: Situation) -> None:
        ask("digests", repr(situation))

    with contextlib.suppress(AssertionError), independent_examples():
        before, now = both.ask("bits.routers")
        if isinstance(before, Uncomputed):
            outcomes.leave_out("routers by name", before)
            before = []
        known = [name for name in now if name in before]  # the earlier commit lacks newer ones
        for arguments in itertools.product(known, layer_variants.VARIANTS, (True, False), (1, 40)):
            ask("digests_of_router", *arguments)
        equal()
    empty = outcomes.report("bits")
    return found[0] if found else empty
