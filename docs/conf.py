"""The site: `sphinx-build --fail-on-warning --keep-going docs docs/_build`, with the extra `docs`.

The pages are the Markdown files of this folder, which read well where they lie too; those of the interface are made
from the docstrings.
"""

from __future__ import annotations

import re
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from torch import nn

from mixture_of_experts import __version__
from mixture_of_experts.gating.steps import NO_EPSILON
from mixture_of_experts.moe import MoEBase

project, author, version, release = "mixture_of_experts", "the mixture_of_experts authors", __version__, __version__
project_copyright = f"{author}, MIT license"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "py:obj"  # `name` in a docstring: a link where the name is documented, else code
suppress_warnings = ["myst.header"]  # a page may begin with an included one

myst_heading_anchors = 3  # a link's #fragment is the heading's, as it is where the repository is read
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what a class does not say of its own is said where it comes from
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
del MoEBase.__new__  # autodoc would show its (*args, **kwargs) instead of the arguments of `__init__`
autodoc_mock_imports = [name for name in ("transformers", "triton") if find_spec(name) is None]
python_display_short_literal_types = True
python_maximum_signature_line_length = 88

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).with_name("search_weights.js"))
templates_path = ["_templates"]
html_sidebars = {"**": ["all_pages.html"]}
html_show_sourcelink = False
urls = dict(line.split(", ", 1) for line in metadata("mixture_of_experts").get_all("Project-URL") or [])
changelog = Path(__file__).parents[1].joinpath("CHANGELOG.md").read_text(encoding="utf-8")
html_context = {
    "repository": urls.get("Repository"),  # the header has no link without one
    "unreleased": f"## {__version__} (not released yet)\n" in changelog,
}
html_theme_options = {
    "navbar_center": [],
    "navbar_end": ["version_and_install.html", "theme-switcher"],
    "navbar_persistent": ["search-field"],
    "search_bar_text": "Search",
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "pygments_dark_style": "github-dark",  # its comments are darker than the code
    "footer_start": ["copyright"],
    "footer_end": [],
}
copybutton_exclude = ".linenos, .gp, .go"  # what is typed, without prompts and output

# Pages of the repository that lie outside this folder, and the page of the site that includes each
INCLUDED = {
    "../README.md": "index.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
    "../benchmarks/README.md": "performance.md",
    "../examples/README.md": "examples.md",
}


# What readers look for, and the section that tells of it under another title
LOOKED_FOR = {
    "concepts": {
        "Routing": ["router", "gate", "top-k", "top_k"],
        "Capacity": ["slot", "drop", "token dropping"],
        "Dropless": ["decode", "generate", "inference", "KV cache"],
        "Padding": ["mask", "pad"],
    },
    "specification": {"Exactly what is computed": ["tie", "rounding", "precision"]},
    "balancing": {
        "Losses": ["auxiliary loss", "aux_loss", "balancing loss", "z-loss"],
        "Expert bias": ["auxiliary-loss-free", "aux-loss-free", "auxiliary loss free"],
    },
    "recipes": {"Recipes": ["Mixtral", "DeepSeek", "Qwen", "OLMoE", "GPT-OSS", "Llama 4", "Kimi", "Switch", "Gemma"]},
    "upcycling": {"Upcycling a dense model": ["upcycle", "sparse upcycling"]},
    "fine_tuning": {"LoRA": ["adapter", "PEFT"], "Packed sequences": ["packing"]},
    "saving_and_exporting": {"Export": ["GGUF"], "Prune": ["pruning"]},
    "published_mixtures": {
        "From beginning to end": ["QLoRA", "fine-tune", "merge"],
        "Serve it": ["serve", "vLLM", "SGLang", "inference engine"],
        "What fits into which card": ["GPU memory", "out of memory"],
    },
    "larger_than_memory": {"A mixture larger than memory": ["offload", "mmap", "disk", "SSD", "out of memory"]},
    "distributed/index": {"Distributed training": ["multi GPU", "multi-GPU", "NCCL", "torchrun"]},
    "distributed/data_parallel": {"FSDP2": ["mixed precision", "bf16", "ZeRO"], "DDP": ["data parallel"]},
    "distributed/expert_parallelism": {"Expert parallelism": ["all-to-all", "EP"]},
    "migration": {
        "DeepSpeed": ["DeepSpeed"],
        "Megatron": ["Megatron"],
        "Tutel": ["Tutel"],
        "fairscale": ["fairscale"],
    },
    "training": {"Switches of a router": ["freeze", "temperature"], "What to set": ["dropout"]},
    "arguments": {"Arguments": ["shared experts", "shared expert"]},
    "versions": {"License": ["license", "licence"]},
    "troubleshooting": {"Troubleshooting": ["NaN", "slow", "dead experts"]},
    "gpu_support": {"GPU support": ["CUDA", "Triton"]},
    "quantization": {"Quantization": ["quantization", "quantisation", "int8", "int4", "4-bit", "8-bit"]},
    "optimizers": {"Muon": ["optimizer"]},
}
NOT_SEARCHED = ("changelog", "contributing")


def lead_to_included(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to files outside of the site lead to the pages that include them."""
    up = "../" * page.count("/")
    for file, included in INCLUDED.items():
        source[0] = source[0].replace(f"]({up}{file}", f"]({up}{included}")


def lead_to_looked_for(app: Sphinx, page: str, source: list[str]) -> None:
    """The search finds these sections first: an entry of the index counts more than a word of the text."""
    for title, words in LOOKED_FOR.get(page, {}).items():
        heading = re.compile(rf"^#+ {title}\n", re.MULTILINE)
        entries = "".join(f"\n```{{index}} ! {word}\n```\n" for word in words)
        source[0], found = heading.subn(rf"\g<0>{entries}", source[0])
        assert found == 1, f"{page} has {found} sections {title!r}"


def leave_out_of_search(app: Sphinx, document: nodes.document) -> None:
    """Pages of history and lists answer no question that their neighbours do not answer better."""
    if app.env.docname in NOT_SEARCHED:
        app.env.metadata[app.env.docname]["nosearch"] = True


def show_signature(
    app: Sphinx, what: str, name: str, shown: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Signatures without private names, and without those of base classes of other libraries."""
    if signature is None:
        return None
    if what == "class" and getattr(shown, "_is_protocol", False):
        return "", returns
    if what == "class" and getattr(shown, "__init__", None) is nn.Module.__init__:
        return "()", returns
    signature = signature.replace("<factory>", "{}").replace("NO_EPSILON", repr(NO_EPSILON))
    return re.sub(r"<class '[\w.]+\.(\w+)'>", r"\1", signature), returns


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", show_signature)
    app.connect("source-read", lead_to_included)
    app.connect("source-read", lead_to_looked_for)
    app.connect("doctree-read", leave_out_of_search)
