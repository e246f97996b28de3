"""Random layers of the package, and what `mixture_of_experts.verify` is to say of each: what the documents say.

    python -m tests.support.verify_random_layers --configurations 200

prints every verdict that is not the documented one, and how often each was given.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

from hypothesis import given

from mixture_of_experts.verify import PROPERTIES, verify

from . import configurations as matrix
from .configurations import Configuration
from .matrix import independent_examples, seed_examples

DEFAULT_PROPERTIES = [name for name in PROPERTIES if name not in ("compile", "invariance")]
DETERMINISTIC_PROPERTIES = (
    *("padding", "nan_padding", "order", "batch", "decoding", "every_choice", "strides", "threads"),
    *("bfloat16", "router_bfloat16", "router_autocast"),
)
EVAL_PROPERTIES = ("decoding", "router_bfloat16", "router_autocast")
SINGLE_GATE_PROPERTIES = ("every_choice", "bfloat16", "router_bfloat16", "router_autocast")


def draw_configurations(count: int, number: int = 0) -> list[Configuration]:
    """Configurations that run without side inputs, in float32, with scores that are no ties."""
    found: list[Configuration] = []

    @seed_examples(number, 4 * count)
    @given(matrix.configurations())
    def take(c: Configuration) -> None:
        routers = tuple(replace(router, spread=min(max(router.spread, 0.3), 3.0)) for router in c.routers)
        c = replace(c, routers=routers, side=(), dtype="float32", implementation="auto", checkpointing=None, frozen=())
        if len(found) < count and c.dim > 1 and matrix.find_expected_error(c) is None:
            found.append(c)

    with independent_examples():
        take()
    assert len(found) == count
    return found


def documented_verdicts(c: Configuration) -> dict[str, set[str]]:
    """The verdicts that the documents allow: more than one where the numbers of a case decide."""
    says = {name: {"holds"} for name in DEFAULT_PROPERTIES}
    kinds = {router.kind for router in c.routers}
    drops = not all(router.is_dropless(training) for router in c.routers for training in (True, False))
    draws = {training: any(router.uses_random_numbers(training) for router in c.routers) for training in (True, False)}
    if "expert_choice" in kinds:
        says["causal"] = says["decoding"] = {"holds", "fails"}
    if drops:
        says["decoding"] = {"holds", "fails"}
        if len(c.routers) == 2 or c.routers[0].arguments.get("priority") != "token":
            says["causal"] = {"holds", "fails"}
    if c.group_size is not None:  # groups are cut from the whole batch
        for name in ("padding", "nan_padding", "order", "batch", "causal", "decoding", "loss_mean"):
            says[name] = {"holds", "fails"}
    if "top2" in kinds:
        says["output_eval"] = {"holds", "fails"}  # policies of training and eval
    if "sparse_mixer" in kinds:
        says["gradients"] = {"holds", "fails"}  # an estimator, in training
    says["every_choice"] = {"holds", "does not apply"}  # a token may choose all experts
    kinds = [router.kind for router in c.routers]
    if len(kinds) > 1 or "expert_choice" in kinds or c.group_size is not None:  # they take no segment_ids
        says["packing"] = {"does not apply"}
    else:
        says["packing"] = {"holds", "does not apply"}  # experts that read slots, with a capacity
    for name in DETERMINISTIC_PROPERTIES:
        if draws[False] and (name in EVAL_PROPERTIES or draws[True]):
            says[name] = says[name] | {"does not apply"}
    if draws[True] or draws[False]:
        says["output_eval"] = says["output_eval"] | {"does not apply"}
    if draws[True]:
        says["loss_mean"] = says["loss_mean"] | {"does not apply"}
    if len(c.routers) == 2:
        says |= {name: {"not asked"} for name in SINGLE_GATE_PROPERTIES}
    return says


def find_wrong_verdicts(
    c: Configuration, properties: list[str], tally: collections.Counter | None = None
) -> Iterator[str]:
    """The verdicts on a configuration that no document allows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = verify(matrix.build_layer(c), properties=properties)
    says = documented_verdicts(c)
    for name, finding in report.findings.items():
        if tally is not None:
            tally[name, finding.verdict] += 1
        if finding.verdict not in says[name]:
            yield f"{name} {finding.verdict} ({finding.number}, {finding.detail}), not {says[name]}: {c}"


def sample_configurations(number: int, count: int) -> list[str]:
    """Some of the properties, others for each number."""
    return random.Random(number).sample(DEFAULT_PROPERTIES, count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configurations", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    given = parser.parse_args()
    tally: collections.Counter = collections.Counter()
    found = 0
    for number, c in enumerate(draw_configurations(given.configurations, given.first_seed), start=1):
        for line in find_wrong_verdicts(c, DEFAULT_PROPERTIES, tally):
            found += 1
            print(line, flush=True)
        if number % 10 == 0:
            print(f"{number} configurations, {found} verdicts that are not the documented ones", file=sys.stderr)
    for name in DEFAULT_PROPERTIES:
        counts = {verdict: count for (of, verdict), count in tally.items() if of == name}
        print(name, ", ".join(f"{verdict} {count}" for verdict, count in sorted(counts.items())))
    print(f"{found} verdicts that are not the documented ones")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
