"""The documentation is true: its Python blocks run, its tables match the code, its links lead somewhere."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import re
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from support import compat_table
from torch.optim.swa_utils import AveragedModel

import mixture_of_experts
from mixture_of_experts import HeirarchicalMoE, MoE
from mixture_of_experts.gating.base import Tokens

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "RELEASING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs").glob("*/*.md")),
]
LARGE = 12 * 2**30  # bytes of memory a machine should have to run a block marked "large"

# an optional mark, `<!-- test: cuda -->` or `<!-- test: large -->`, then the block
BLOCK = re.compile(r"(?:^<!-- test: (?P<mark>\w+) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
# behind a block: what it prints, or lines of that
OUTPUT = re.compile(r"(?P<prose>[^`]*It prints(?:(?!```).)*?)^```text\n(?P<lines>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A Python block of a document."""

    file: Path
    line: int  # of its first line of code
    mark: str | None
    code: str
    prints: tuple[str, ...]  # lines that the page says it prints

    def run(self) -> dict[str, Any]:
        """Run it alone, as a reader who copies it would; tracebacks show the document's own lines. What it defined."""
        program = compile("\n" * (self.line - 1) + self.code, str(self.file), "exec")
        module, own = ModuleType("__main__"), sys.modules["__main__"]
        sys.modules["__main__"] = module  # where torch.compile looks for what the block imported
        try:
            exec(program, vars(module))
        finally:
            sys.modules["__main__"] = own
        return vars(module)


def read_blocks(file: Path) -> list[Block]:
    text = file.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        output = OUTPUT.match(text, match.end())
        prints = tuple(output["lines"].splitlines()) if output else ()
        found.append(Block(file, line, match["mark"], match["code"], prints))
    return found


BLOCKS = [block for file in DOCUMENTS for block in read_blocks(file)]
GETTING_STARTED = [block for block in BLOCKS if block.file.name == "getting_started.md"]


def skip_reason(block: Block) -> str | None:
    """Why a block cannot run on this machine."""
    if ("transformers" in block.code or "from peft" in block.code) and find_spec("transformers") is None:
        return "the extra 'hf' is not installed"
    if "import lightning" in block.code and find_spec("lightning") is None:
        return "lightning is not installed"
    if block.mark == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device"
    if block.mark == "large" and os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < LARGE:
        return "needs a machine with 12 GB of memory"
    return None


def ignore_lightning_warnings(test: Callable[..., None]) -> Callable[..., None]:
    """Ignore warnings about an interface of torch that Lightning uses, and about loaders without workers."""
    for ignored in ("ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers:UserWarning"):
        test = pytest.mark.filterwarnings(ignored)(test)
    return test


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in PEFT
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # likewise
@ignore_lightning_warnings
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.file.relative_to(ROOT)}:{block.line}")
def test_python_block_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert block.mark in (None, "cuda", "large")
    if reason := skip_reason(block):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    block.run()
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in block.prints if line.rstrip() not in printed] == [], "\n".join(printed)


def test_every_output_is_compared():
    """A page that says what a block prints says it in a block of text, which the test above compares."""
    described = sum(len(re.findall("(?<!`)It prints", read_prose(file))) for file in DOCUMENTS)
    assert len([block for block in BLOCKS if block.prints]) == described > 1


def test_layers_of_the_recipe_for_a_loss_that_is_not_handed_up_can_be_copied():
    """After a training forward, whose graph is still there."""
    (block,) = (block for block in GETTING_STARTED if "collect_aux" in block.code)
    names = block.run()
    layers, x = names["layers"], torch.randn(2, 5, 64)
    with names["collect_aux"](layers) as aux:
        loss = layers(x).square().mean() + aux.take()
        copies = copy.deepcopy(layers), AveragedModel(layers)
    loss.backward()
    for other in copies:
        outputs = []
        for model in (layers, other):
            torch.manual_seed(1)  # policy random draws
            outputs.append(model.eval()(x))
        assert torch.equal(*outputs)


def test_initial_weights_of_the_recipe_reach_the_experts():
    (block,) = (block for block in GETTING_STARTED if "def init_weights" in block.code)
    experts = block.run()["model"][1].experts
    assert [round(parameter.std().item(), 3) for parameter in experts.parameters()] == [0.02, 0.02]


def test_saturated_logits_of_the_custom_sigmoid_router_are_finite():
    """The sigmoids of all experts underflow to 0 in float32."""
    (block,) = (block for block in BLOCKS if "class SigmoidGating" in block.code)
    names = block.run()
    moe, x = names["moe"], torch.ones(1, 3, 8)
    moe.gate.w_gating.data.fill_(-30.0)  # logits of -240
    out, aux_loss = moe(x)
    (out.square().mean() + aux_loss).backward()
    gradient = moe.gate.w_gating.grad
    assert all(tensor.isfinite().all() for tensor in (out, aux_loss, gradient))


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_rank_has_a_gpu_of_its_own(file: Path):
    """Where code starts a group of several processes, it first sets the device."""
    for code in re.findall(r"^```py(?:thon)?\n(.*?)^```$", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for start in re.finditer(r"^ *dist\.init_process_group\((?!.*HashStore)", code, re.MULTILINE):
            assert 'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))' in code[: start.start()]


def test_page_names_every_attribute_of_tokens():
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    properties = {name for name, value in vars(Tokens).items() if isinstance(value, property)}
    expected = {field.name for field in dataclasses.fields(Tokens)} | properties - {"computed_padding"}
    assert sorted(re.findall(r"^\| `tokens\.(\w+)` \|", text, re.MULTILINE)) == sorted(expected)


@ignore_lightning_warnings
def test_tracking_a_lightning_module_raises():
    """Its trainer calls `training_step`; the page says what to track instead."""
    lightning = pytest.importorskip("lightning")
    (block,) = (block for block in BLOCKS if "class Mixture(lightning" in block.code)
    names = block.run()
    trainer = lightning.Trainer(max_steps=1, logger=False, enable_checkpointing=False)
    with (
        names["track_routing"](names["module"]),
        pytest.raises(RuntimeError, match=r"'model.gate' ran outside a forward pass of the module"),
    ):
        trainer.fit(names["module"], names["batches"])


def test_every_python_block_is_found():
    """A fence that the pattern above misses would be a block that nobody runs."""
    fences = sum(file.read_text(encoding="utf-8").count("```python") for file in DOCUMENTS)
    assert len(BLOCKS) == fences > 10


def argument_rows() -> dict[str, str]:
    """Name and default of every row of the table of arguments."""
    text = (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))


def get_default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "required"
    if parameter.default is torch.nn.GELU:
        return "nn.GELU"
    return repr(parameter.default)


def test_argument_table_matches_signature():
    parameters = inspect.signature(MoE).parameters
    assert argument_rows() == {name: get_default(parameter) for name, parameter in parameters.items()}
    two_levels = set(inspect.signature(HeirarchicalMoE).parameters)
    assert two_levels - set(parameters) == {"gate_outer", "gate_inner", "capacity_factor_second_level"}
    assert set(parameters) - two_levels == {"gate"}


def test_page_of_correctness_names_every_exception():
    """The table that the tests write has a reason for each; the page has them all."""
    cells = compat_table.read_table(compat_table.DOCUMENT.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    reasons = set(cells.values()) - {compat_table.YES}
    assert [reason for reason in reasons if reason not in page] == []
    assert len(reasons) > 3


def read_prose(file: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_line_is_a_comment_of_the_site(file: Path):
    """A line that begins with % is missing on the site."""
    assert re.findall(r"^[ \t]*%.*$", read_prose(file), re.MULTILINE) == []


def list_anchors(file: Path) -> set[str]:
    """The fragments by which its headings are linked."""
    headings = re.findall(r"^#+ (.+)$", read_prose(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(file: Path):
    missing = []
    for target, fragment in re.findall(r"(?:\]\(|src=\")(?!http)([^)#\s\"]*)(?:#([^)\"]+))?", read_prose(file)):
        page = file.parent / target if target else file
        if not page.exists() or (fragment and fragment not in list_anchors(page)):
            missing.append(f"{target}#{fragment}")
    assert not missing


def test_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == mixture_of_experts.__version__


PICTURES = {"draw_moe.py": "README.md", "draw_package.py": "CONTRIBUTING.md", "draw_concepts.py": "docs/concepts.md"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each that the page shows. Scripts find the stories that the pictures tell in a gate's own numbers."""
    given = [str(tmp_path / "moe.png")] if name == "draw_moe.py" else ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [name, *given])
    script = runpy.run_path(str(ROOT / "docs" / name), run_name="__main__")
    shown = set(re.findall(r"(?:\]\(|src=\")(?:docs/)?(?:images/)?(\w+\.png)", (ROOT / PICTURES[name]).read_text()))
    assert {path.name for path in tmp_path.iterdir()} == (shown if name != "draw_moe.py" else {"moe.png"} & shown)
    if name == "draw_moe.py":
        _, choices, capacity = script["route"]()
        kept = {word: [c.kept for c in choices if c.token == token] for token, word in enumerate(script["TOKENS"])}
        assert capacity == 3
        assert kept[script["FOLLOWED"]] == [True, True]
        assert kept[script["DROPPED"]] == [False, False]
