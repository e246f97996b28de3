"""Verifies mixture-of-experts layers. Each of thirty-two properties has a promise, a measurement and a verdict."""

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

#: each property's promise in one sentence, keyed by property name
PROPERTIES = {each.name: each.promise for each in _ALL_PROPERTIES}


def verify(
    module: nn.Module,
    *,
    dim: int | None = None,
    mask: str | RunFunction | None = None,
    loss: int | str | RunFunction | None = None,
    router: RunFunction | None = None,
    segment_ids: str | RunFunction | None = None,
    properties: Iterable[str] | None = None,
) -> Report:
    """Measure the properties of a mixture-of-experts layer. All measurements run copies of the module, never the module
    itself.

    Only `module` is required. Properties that need a missing argument are skipped. For `MoE` and `HeirarchicalMoE`, all
    arguments are inferred. The router is also inferred for blocks that contain one gate of this package or one router
    of another library.

    Args:
        module: a module that maps `(b, n, d)` to a tensor of the same shape, or to a tuple that starts with such a
            tensor. A small module is sufficient, because the properties do not depend on its size.
        dim: the model dimension d. Default: inferred from the weights, which requires that exactly one weight dimension
            works as the input width.
        mask: name of the argument for a bool mask `(b, n)` that is True for real tokens, or a function
            `(module, x, mask)` that calls the module.
        loss: index or key of the auxiliary loss in the module's return value, or a function `(module, returned)` that
            extracts it.
        router: a function `(module, x)` that returns the experts of each token, either as integers `(b, n, k)` with -1
            for no expert, or as a bool tensor `(b, n, e)`.
        segment_ids: name of the argument for the integer document ids `(b, n)` of packed rows, or a function
            `(module, x, segment_ids)` that calls the module.
        properties: names of the properties to measure. Default: all except "invariance" and "compile".

    Raises:
        ValueError: a property is unknown, the module cannot be copied, or its input width cannot be inferred.

    Example:
        >>> from mixture_of_experts import MoE, TopKGating
        >>> from mixture_of_experts.verify import verify
        >>> report = verify(MoE(dim=8, gate=TopKGating(8, 4)), properties=["causal", "counts_eval"])
        >>> report.findings["causal"].verdict, report.failed
        ('holds', [])
    """
    names = {each.name for each in _ALL_PROPERTIES if not each.is_opt_in} if properties is None else set(properties)
    if unknown := names - set(PROPERTIES):
        raise ValueError(f"unknown properties {sorted(unknown)}; the available properties are {sorted(PROPERTIES)}")
    with torch.random.fork_rng(range(torch.cuda.device_count())), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with preserve_settings():  # changed settings must not affect other measurements or the caller
            trial = infer_arguments(Trial(module, dim or 0, mask, loss, router, segment_ids))
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
    """Assert that a module has the given properties. Use this function in your own tests.

    Args:
        module: see `verify`.
        properties: names of the properties to check. Default: the properties that `verify` measures by default.
        arguments: the arguments `dim`, `mask`, `loss`, `router` and `segment_ids` of `verify`.

    Raises:
        AssertionError: a specified property fails, does not apply, or is not measured because a required argument is
            missing. Omit properties that do not apply. If no properties are specified, only failing properties raise an
            error. The error message includes the report, and states the reason for each of these properties.

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
    """Convert a verdict to a phrase for an error message, including the remedy."""
    return {
        "does not apply": "does not apply to this layer (omit it)",
        "not asked": "was not measured",
    }.get(verdict, verdict)
