"""The tables of docs/recipes.md, made from `recipes.MODELS`."""

from __future__ import annotations

import inspect
import re

from mixture_of_experts import ReLUGating, Top2Gating, TopKGating, TopPGating, recipes
from mixture_of_experts.recipes import MODELS, Recipe

from .doc_recipes import DOCS
from .strategies import KINDS

PAGE, CONCEPTS = DOCS / "recipes.md", DOCS / "concepts.md"
FUNCTIONS = {name: getattr(recipes, name) for name in MODELS if inspect.isfunction(getattr(recipes, name, None))}


def replace_tables(text: str) -> str:
    """The page with both tables written anew, below their headers."""
    for header, lines in (("model", list_recipes()), ("recipes with", recipes_with_properties())):
        table = re.compile(rf"(\n\| {header} \|.*\n\|[-|]+\|\n)(?:\|.*\n)*")
        text, found = table.subn(lambda old, lines=lines: old[1] + "\n".join([*lines, ""]), text)
        assert found == 1, header
    return text


def replace_router_table(text: str) -> str:
    """The page of concepts with the rows that routers have in `KINDS`, and the recipes with each in the last column."""
    head = "\n| router | who chooses |"
    table = text[text.index(head) :].partition("\n\n")[0]
    lines = table.splitlines()
    for kind in KINDS.values():
        if kind.row:
            start, line = f"| {kind.row.partition(' |')[0]} |", f"| {kind.row} | none |"
            lines = [line if old.startswith(start) else old for old in lines]
            lines += [line] * (line not in lines)
    return replace_router_recipes(text.replace(table, "\n".join(lines)))


def replace_router_recipes(text: str) -> str:
    used: dict[tuple[str, bool], list[str]] = {}
    for name in FUNCTIONS:
        model = MODELS[name]
        used.setdefault((model.gate_class.__name__, "expert_bias" in model.gate), []).append(f"`{name}`")

    def written(row: re.Match[str]) -> str:
        names = used.pop((row["router"], "expert bias" in row["variant"]), ["none"])
        return f"{row['before']}{', '.join(names)} |"

    begin, end = text.index("## Routing\n"), text.index("\n## ", text.index("## Routing\n"))
    row = re.compile(r"^(?P<before>\| `(?P<router>\w+)`(?P<variant>.*?) \| .* \| )[^|]* \|$", re.MULTILINE)
    text = text[:begin] + row.sub(written, text[begin:end]) + text[end:]
    assert not used, f"the table of routers in docs/concepts.md has no row for {list(used)}"
    return text


def list_recipes() -> list[str]:
    return [format_row(name, MODELS[name]) for name in FUNCTIONS]


def format_row(name: str, model: Recipe) -> str:
    """What a recipe sets, in words of its own."""
    settings = {key: value for key, value in model.gate.items() if key not in ("balance_over", "k")}
    gate = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    gate = f"`{gate}`" if gate else ""
    logits = "" if model.logits is None else f"logits `{', '.join(f'{k}={v!r}' for k, v in model.logits.items())}`"
    scales = "" if model.scales is None else f"and learned {model.scales} scales"
    parts = [model.experts.get("activation", "silu")]
    parts += [] if model.experts.get("gated", True) else ["not gated"]
    parts += [f"limit {model.experts['limit']:g}"] if "limit" in model.experts else []
    parts += ["with biases"] if model.experts.get("bias") else []
    parts += [f"latent dimension {model.latent:g} d with a norm"] if model.latent else []
    parts += ["weights applied to expert inputs"] if model.apply_router_weight_on_input else []
    parts += [f"{model.identity:g} e identity experts"] if model.identity else []
    parts += [f"{model.zero} zero expert"] if model.zero else []
    parts += ["gated " * model.shared_gate + f"shared expert ({model.shared:g} h)"] if model.shared else []
    kind = "" if model.gate_class is TopKGating else f"`{model.gate_class.__name__}`"
    says = inspect.getdoc(FUNCTIONS[name]).partition(":")[0]  # what the model is called
    says = f"[{says}](https://arxiv.org/abs/{model.paper})" if model.paper else says
    sizes = (
        ""
        if model.published is None
        else (f"{model.published.name}: {format_billions(model.published.active, model.published.total)}")
    )
    cells = [f"{says} `{name}`", format_choices(model), sizes, " ".join(filter(None, (kind, gate, logits, scales)))]
    cells.append(", ".join(parts))
    return f"| {' | '.join(cells)} | {format_losses(model)} |"


def format_choices(model: Recipe) -> str:
    """How many experts a token chooses, of how many."""
    k = str(model.gate.get("k", {Top2Gating: 2}.get(model.gate_class, "")))
    k = f"at most {k}" if model.gate_class in (TopPGating, ReLUGating) else k or "experts choose"
    return f"{k} of {model.published.num_experts:,}" if model.published else k


def format_billions(active: float | None, total: float) -> str:
    """Without the active ones if they are not published."""
    return f"{total:,g} total" if active is None else f"{active:,g} of {total:,g}"


def format_losses(model: Recipe) -> str:
    """The coefficients of a recipe."""
    coefs = {**model.layer, **model.layer.get("loss_coefs", {})}
    coefs.pop("loss_coefs", None)
    if model.router_aux_loss_coef is not None:
        coefs["loss_coef"] = "{:g} k / {}".format(*model.router_aux_loss_coef)
    coefs.setdefault("loss_coef", "0.01, the package default")
    batch = " (batch-level)" if model.gate.get("balance_over") == "batch" else ""
    text = [
        f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in coefs.items() if value
    ]
    return ", ".join(text) + batch


#: of the second table: a property, and whether a recipe has it
PROPERTIES = {
    "sigmoid scores": lambda model: model.gate.get("score") == "sigmoid",
    "an expert bias": lambda model: "expert_bias" in model.gate,
    "a shared expert": lambda model: model.shared > 0,
    "fewer than 60 billion parameters": lambda model: model.published is not None and model.published.total < 60,
    "more than 200 billion parameters": lambda model: model.published is not None and model.published.total > 200,
}


def recipes_with_properties() -> list[str]:
    return [
        f"| {says} | {', '.join(f'`{name}`' for name in FUNCTIONS if has(MODELS[name]))} |"
        for says, has in PROPERTIES.items()
    ]
