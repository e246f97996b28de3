"""Which families of `transformers` upcycle: each is built tiny, upcycled, trained, saved, loaded and compared.

    python -m tests.support.family_table [--results FILE] [--write FILE] [family ...]

With `--results` families that are in the file are not run again. All of them take about half an hour of one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import transformers
from torch import nn

from mixture_of_experts.huggingface import from_pretrained, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from tests.support.transformers_families import (
    build_model,
    compute_outputs,
    list_other_classes,
    list_text_types,
    make_inputs,
)

TOLERANCE = 1e-4  # largest difference of an output, in standard deviations of all of them


ResultKind = Literal["upcycles", "refused", "wrong", "unbuilt"]


class Result(NamedTuple):
    """What became of a family.

    Attributes:
        kind: "upcycles", "refused", "wrong", or "unbuilt" where no tiny model could be made.
        model: class of the model.
        networks: paths of the networks, numbers as stars.
        reason: of a refusal, or what was wrong.
    """

    kind: ResultKind
    model: str = ""
    networks: tuple[str, ...] = ()
    reason: str = ""


def try_family(model_type: str, model_class: Any = None) -> Result:
    """Build, compare and say how it went."""
    try:
        model = build_model(model_type, model_class)
        given = make_inputs(model)
        dense = compute_outputs(model, given)
    except Exception as error:  # any of the rules does not fit
        return Result("unbuilt", reason=f"{type(error).__name__}: {error}"[:200])
    name = type(model).__name__
    (trained, plain), state = (
        (copy.deepcopy(model) for _ in range(2)),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    try:
        found = upcycle(model, num_experts=4, k=2)
    except (ValueError, TypeError) as error:
        same = state.keys() == model.state_dict().keys()
        return Result("refused" if same else "wrong", name, reason=shorten_error(error, name))
    networks = tuple({to_path_pattern(path): None for path in found})
    wrong = [what for what, off in compare_family(model, trained, plain, given, dense).items() if off > TOLERANCE]
    return Result("wrong" if wrong else "upcycles", name, networks, ", ".join(wrong))


def compare_family(
    model: Any, trained: Any, plain: Any, given: dict[str, Any], dense: torch.Tensor
) -> dict[str, float]:
    """How far an upcycled model is from the dense one: in evaluation, in training, and after save and load."""
    unit = dense.std()
    called = [0]
    for feed_forward in find_feed_forwards(model):
        feed_forward.moe.register_forward_hook(lambda *_: called.__setitem__(0, called[0] + 1))
    found = compute_outputs(model, given)
    far = {"evaluation": float((found - dense).abs().max() / unit), "not called": 0.0 if called[0] else 1.0}

    far["training"] = training_difference(copy.deepcopy(plain), trained, given)
    if far["training"] > TOLERANCE:  # norms over a tiny batch make rounding large: as large, then, as the rounding is
        far["training"] = training_difference(plain.double(), copy.deepcopy(plain), to_float64(given))
        plain.float()
    if check_reload(plain.eval(), given, dense):
        far["loading"] = reload_model(model, given, found)
    return far


def training_difference(dense: Any, swapped: Any, given: dict[str, Any]) -> float:
    """One expert draws the same dropout as the network."""
    expected = seeded_outputs(dense.train(), given)
    upcycle(swapped.eval(), num_experts=1, k=1)
    return float((seeded_outputs(swapped.train(), given) - expected).abs().max() / expected.std())


def to_float64(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def check_reload(model: Any, given: dict[str, Any], dense: torch.Tensor) -> bool:
    """Whether transformers itself loads what it saved of the dense model."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            return torch.equal(compute_outputs(type(model).from_pretrained(folder).eval(), given), dense)
        except Exception:  # any of their own
            return False


def reload_model(model: Any, given: dict[str, Any], found: torch.Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            again = from_pretrained(folder, type(model)).eval()
        except (ValueError, RuntimeError):
            return float("inf")
        return float((compute_outputs(again, given) - found).abs().max())


def seeded_outputs(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    transformers.set_seed(7)  # that of numpy too, which draws SpecAugment's masks
    return compute_outputs(model, given)


def to_path_pattern(path: str) -> str:
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", path)


def shorten_error(error: Exception, name: str) -> str:
    """The reason in an error's text."""
    text = str(error).split(". Say by")[0]
    return "none was found" if "its modules are" in text else text.split(f"{name}: ")[-1].replace("|", "or")


def format_table(results: dict[str, Result], title: str) -> list[str]:
    """How many upcycle, and the exceptions: by reason where several share one, else in a table."""
    kinds = {kind: {n: r for n, r in results.items() if r.kind == kind} for kind in get_args(ResultKind)}
    tried = len(results) - len(kinds["unbuilt"])
    refused, wrong = len(kinds["refused"]), len(kinds["wrong"]) or "none"
    reasons = {n: r.reason for n, r in kinds["refused"].items()}
    shared = {reason: [n for n in reasons if reasons[n] == reason] for reason in SHARED_REASONS}
    return [
        f"## {title}",
        "",
        f"{len(kinds['upcycles'])} of {tried} upcycle, {refused} are refused, {wrong} upcycle to other numbers.",
        "",
        *(f"- {says}: {', '.join(shared[reason])}." for reason, says in SHARED_REASONS.items() if shared[reason]),
        f"- No tiny model could be made by the rules of: {', '.join(kinds['unbuilt']) or 'none'}.",
        *("", "| family | why not |", "|---|---|"),
        *(
            f"| {n} | {format_patterns(split_reason(reason))} |"
            for n, reason in reasons.items()
            if reason not in SHARED_REASONS
        ),
        *(f"| {n} | equal, but not in: {r.reason} |" for n, r in kinds["wrong"].items()),
        "",
    ]


SHARED_REASONS = {
    "its blocks already have routers and experts": "Their blocks already have routers and experts",
    "none was found": "No feed-forward network of two or three linear layers is found in",
}


def split_reason(reason: str) -> str:
    """Of a reason for several networks, that of the first."""
    found = re.search(r"others cannot: (.*?)(;|$)", reason)
    return f"some networks can be replaced, others cannot: {found[1]}" if found else reason


def format_patterns(text: str) -> str:
    """Paths with stars would be read as emphasis."""
    return re.sub(r"[\w.]*\*[\w.*]*", lambda match: f"`{match[0]}`", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    others = list_other_classes()
    text = list(list_text_types())
    known: dict[str, Result] = {}
    if arguments.results and arguments.results.exists():
        known = {name: Result(*values) for name, values in json.loads(arguments.results.read_text()).items()}
    for name in arguments.families or [*text, *others]:
        if name not in known or arguments.families:
            known[name] = try_family(name, others.get(name))
            print(f"{name:28} {known[name].kind:10} {' '.join(known[name].networks)} {known[name].reason}", flush=True)
            if arguments.results:
                arguments.results.write_text(json.dumps(known))
    if arguments.write:
        of_text = {name: result for name, result in known.items() if name not in others}
        of_others = {name: result for name, result in known.items() if name in others}
        lines = [*TABLE_HEADER, *format_table(of_text, "Text"), *format_table(of_others, "Pictures and sound")]
        arguments.write.write_text("\n".join(lines).rstrip() + "\n")


TABLE_HEADER = [
    "# Families that do not upcycle",
    "",
    f"The families of text, pictures and sound of transformers {transformers.__version__} upcycle, but for those named",
    f"here: outputs are within {TOLERANCE} of the dense model's, in units of their deviation. That holds with four "
    f"experts",
    "in evaluation, and with one expert and the same seed in training, with the dropout of the family's configuration.",
    "They are equal after saving and loading, where transformers can load the saved dense model. If a family is",
    "refused, the model is not changed.",
    "",
    "```bash",
    "python -m tests.support.family_table --write FILE",
    "```",
    "",
]


if __name__ == "__main__":
    main()
