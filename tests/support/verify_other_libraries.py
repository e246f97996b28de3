"""Verifies layers of others, and ours beside them.

    python -m tests.support.verify_other_libraries

prints the tables of docs/verify.md. torchtitan and st-moe-pytorch are verified if they can be imported, all sparse
blocks of the installed transformers in any case. `--show NAME` prints the whole report of one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mixture_of_experts import ExpertChoiceGating, MoE, Top2Gating, TopKGating
from mixture_of_experts.verify import Finding, Report, verify

from .verify_random_layers import DEFAULT_PROPERTIES

DIM, EXPERTS = 16, 8
SHOWN_BLOCKS = (  # of the blocks of transformers, those that the first table has
    *("MixtralSparseMoeBlock", "DeepseekV3MoE", "DbrxFFN", "SwitchTransformersSparseMLP", "NllbMoeSparseMLP"),
)
Layer = tuple[nn.Module, dict[str, Any]]


def list_our_layers() -> Iterator[tuple[str, Layer]]:
    every = {"second_policy_train": "all", "second_policy_eval": "all"}
    yield "MoE, top-k, dropless", (MoE(DIM, gate=TopKGating(DIM, EXPERTS, expert_bias=True)), {})
    yield "MoE, top-2, capacity", (MoE(DIM, gate=Top2Gating(DIM, EXPERTS, **every)), {})
    yield "MoE, expert choice", (MoE(DIM, gate=ExpertChoiceGating(DIM, EXPERTS)), {})


def make_torchtitan() -> Layer:
    """As its Mixtral-like models have it; experts compute in bfloat16."""
    from torchtitan.models.common import moe  # pyright: ignore[reportMissingImports]
    from torchtitan.models.common.linear import Linear  # pyright: ignore[reportMissingImports]
    from torchtitan.models.common.token_dispatcher import (  # pyright: ignore[reportMissingImports]
        LocalTokenDispatcher,
    )

    layer = moe.MoE.Config(
        num_experts=EXPERTS,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=DIM, hidden_dim=32, num_experts=EXPERTS),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=2),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS, gate=Linear.Config(in_features=DIM, out_features=EXPERTS), top_k=2
        ),
    ).build()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=DIM**-0.5)
    return layer, {"router": lambda module, x: module.router(x)[1]}


def make_st_moe() -> Layer:
    """With thresholds of 0, at which it draws nothing: second choices are always made."""
    from st_moe_pytorch import MoE as Theirs  # pyright: ignore[reportMissingImports]

    def router(module: Any, x: torch.Tensor) -> torch.Tensor:
        return (module.gate(x)[1] > 0).any(dim=-1)  # the combine tensor (b, n, e, c)

    return Theirs(DIM, EXPERTS, threshold_train=0.0, threshold_eval=0.0), {"loss": 1, "router": router}


def list_layers() -> Iterator[tuple[str, Callable[[], Layer]]]:
    """Names, and what makes the layer."""
    for name, layer in list_our_layers():
        yield name, lambda layer=layer: layer
    for name, package, make in (
        ("torchtitan MoE", "torchtitan", make_torchtitan),
        ("st-moe-pytorch MoE", "st_moe_pytorch", make_st_moe),
    ):
        if find_spec(package):
            yield name, make
    from . import transformers_blocks as blocks

    for name in blocks.BLOCKS:
        if blocks.EXCLUDED_BLOCKS.get(name, "").startswith("experts of an attention layer"):
            continue
        yield name, lambda name=name: (blocks.BlockInModel(blocks.make_block(name)), {"dim": blocks.DIM})


def format_failure(finding: Finding) -> str:
    """A property that fails, with the number that was measured if there is one."""
    return f"`{finding.name}`" + ("" if finding.number is None else f" {finding.number:.2g}")


def list_versions() -> str:
    names = ("torch", "transformers", "torchtitan", "st-moe-pytorch")
    found = [f"{name} {version(name)}" for name in names if find_spec(name.replace("-", "_"))]
    return ", ".join(found)


def format_tables(reports: dict[str, Report]) -> str:
    """A table of some layers, and one of all blocks by what fails."""
    first = [
        name for name in reports if name in SHOWN_BLOCKS or name.split()[0] in ("MoE,", "torchtitan", "st-moe-pytorch")
    ]
    lines = ["| layer | fails | does not apply |", "|---|---|---|"]
    for each in first:
        found = [reports[each].findings[name] for name in DEFAULT_PROPERTIES]
        fails = [format_failure(finding) for finding in found if finding.verdict == "fails"]
        idle = [f"`{finding.name}`" for finding in found if finding.verdict == "does not apply"]
        lines.append(f"| {each} | {', '.join(fails) or 'nothing'} | {', '.join(idle)} |")
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, report in reports.items():
        if not name.startswith(("MoE,", "torchtitan", "st-moe-pytorch")):
            kinds.setdefault(tuple(report.failed), []).append(name)
    lines += ["", "| fails | blocks of transformers |", "|---|---|"]
    for failed, names in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        what = ", ".join(f"`{name}`" for name in failed) or "nothing"
        shown = sorted(names) if len(names) <= 4 else ["`--show NAME` tells of each"]
        lines.append(f"| {what} | {len(names)}: {', '.join(shown)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", metavar="NAME", nargs="+")
    given = parser.parse_args()
    reports: dict[str, Report] = {}
    for name, make in list_layers():
        if given.show and name not in given.show:
            continue
        torch.manual_seed(0)
        layer, described = make()
        reports[name] = verify(layer, **described)
        print(f"{name}: fails {reports[name].failed}", file=sys.stderr, flush=True)
        if given.show:
            print(reports[name])
    if not given.show:
        print(f"{list_versions()}; {len(DEFAULT_PROPERTIES)} properties\n\n{format_tables(reports)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
