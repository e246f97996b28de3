"""Verifies any mixture layer: what is promised, a number, and a verdict, for each of thirty-one properties."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mixture_of_experts.verify import batching, precision, states, steps
from mixture_of_experts.verify.kinds import expected_failures
from mixture_of_experts.verify.properties import Property
from mixture_of_experts.verify.settings import preserve_settings
from mixture_of_experts.verify.trial import RunFunction, Trial, infer_arguments
from mixture_of_experts.verify.verdicts import Finding, Report

__all__ = ["PROPERTIES", "Finding", "Report", "assert_holds", "verify"]

_ALL_PROPERTIES = [
    each for file in (batching, steps, states, precision) for each in vars(file).values() if isinstance(each, Property)
]

#: what is promised, in one sentence, by the name of the property
PROPERTIES = {each.name: each.promise for each in _ALL_PROPERTIES}


def verify(
    module: nn.Module,
    *,
    dim: int | None = None,
    mask: str | RunFunction | None = None,
    loss: int | str | RunFunction | None = None,
    router: RunFunction | None = None,
    properties: Iterable[str] | None = None,
) -> Report:
    """Measure what a mixture layer keeps. The module itself does not run: copies of it do.

    Nothing but `module` has to be told. What is not told is not asked. Of `MoE` and `HeirarchicalMoE` all is known, and
    of blocks that contain one gate of this package, or a router of transformers, the router.

    Args:
        module: maps `(b, n, d)` to the same shape, or to a tuple that begins with it. Make it small: what is verified
            does not depend on its sizes.
        dim: d; by default the one size of its weights with which it runs.
        mask: the argument that takes a mask `(b, n)` bool, True where a token is real; or a function `(module, x,
            mask)` that calls the module.
        loss: where the auxiliary loss is in what the module returns, an index or a key; or a function `(module,
            returned)` that reads it.
        router: a function `(module, x)` that returns `(b, n, k)` integers, the experts of each token, -1 for no expert,
            or `(b, n, e)` bool.
        properties: names of the properties; by default all but "invariance" and "compile".

    Raises:
        ValueError: an unknown property; the module cannot be copied, or its width is not found.

    Example:
        >>> from mixture_of_experts import MoE, TopKGating
        >>> from mixture_of_experts.verify import verify
        >>> report = verify(MoE(dim=8, gate=TopKGating(8, 4)), properties=["causal", "counts_eval"])
        >>> report.findings["causal"].verdict, report.failed
        ('holds', [])
    """
    names = {each.name for each in _ALL_PROPERTIES if not each.is_opt_in} if properties is None else set(properties)
    if unknown := names - set(PROPERTIES):
        raise ValueError(f"no property is named {sorted(unknown)}: there are {sorted(PROPERTIES)}")
    with torch.random.fork_rng(range(torch.cuda.device_count())), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with preserve_settings():  # a module that changes them spoils neither other measurements nor the caller
            trial = infer_arguments(Trial(module, dim or 0, mask, loss, router))
        findings = {}
        for each in _ALL_PROPERTIES:
            if each.name in names:
                with preserve_settings():
                    findings[each.name] = each.measure_module(trial)
        for name, reason in expected_failures(module).items():
            if name in findings and findings[name].verdict == "fails":
                findings[name] = replace(findings[name], expected=reason)
    return Report(f"{type(module).__name__}, {trial.dim} wide", findings)


def assert_holds(module: nn.Module, *properties: str, **arguments: Any) -> None:
    """Assert that a module has properties, in a test of your own.

    Args:
        module: as in `verify`.
        properties: names of properties; as in `verify` if none is given.
        told: `dim`, `mask`, `loss` and `router`, as in `verify`.

    Raises:
        AssertionError: a property fails, does not apply or is not asked (without `properties`: one fails). A named
            property has to be shown: where it does not apply, leave it out. The error says which property was not
            shown and why, and has the report.

    Example:
        >>> from mixture_of_experts import MoE, TopKGating
        >>> from mixture_of_experts.verify import assert_holds
        >>> assert_holds(MoE(dim=8, gate=TopKGating(8, 4)), "causal", "padding")
    """
    report = verify(module, properties=properties or None, **arguments)
    missing = [
        each for each in report.findings.values() if each.verdict == "fails" or (properties and each.verdict != "holds")
    ]
    if missing:
        lines = [f"{each.name!r} was not shown: it {phrase_of(each.verdict)}, {each.detail}" for each in missing]
        raise AssertionError("\n".join([*lines, "", str(report)]))


def phrase_of(verdict: str) -> str:
    """A verdict within a sentence, with the remedy."""
    return {
        "does not apply": "does not apply to this layer (leave it out)",
        "not asked": "was not measured",
    }.get(verdict, verdict)
