"""Checks a site that was built: `check_site.py FOLDER`. Its search finds what readers ask for; pictures are there."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import snowballstemmer

ASKED_FOR = {
    "capacity": "concepts",
    "padding": "concepts",
    "causality": "concepts",
    "TRL": "fine_tuning",
    "collapse": "troubleshooting",
    "jitter": "glossary",
    "QLoRA": "published_mixtures",
    "vLLM": "published_mixtures",
    "serve": "published_mixtures",
    "tie": "specification",
    "top_k": "glossary",
    "DeepSpeed": "migration",
}

FIRST = {
    "mask": "concepts",
    "decode": "concepts",
    "tie": "specification",
    "auxiliary-loss-free": "balancing",
    "serve": "published_mixtures",
    "qlora": "published_mixtures",
    "mixed precision": "distributed/data_parallel",
    "multi gpu": "distributed/index",
    "license": "versions",
    "dropout": "training",
    "shared experts": "arguments",
}  # by an entry of the index, which comes before words of a text
HISTORY = ("changelog", "contributing")  # not searched

PARTS = ("gating", "huggingface", "ops", "parallel", "replay", "stats", "verify")
PUBLIC = ["mixture_of_experts", *(f"mixture_of_experts.{part}" for part in PARTS)]

site = Path(sys.argv[1])
index = json.loads(re.sub(r"^Search\.setIndex\((.*)\)$", r"\1", (site / "searchindex.js").read_text(encoding="utf-8")))
stemmer = snowballstemmer.stemmer("english")
for word, page in ASKED_FOR.items():
    stem = stemmer.stemWord(word.lower())
    found = [index[part].get(stem, []) for part in ("terms", "titleterms")]
    pages = {index["docnames"][number] for hits in found for number in (hits if isinstance(hits, list) else [hits])}
    assert page in pages, f"the search for {word!r} finds {sorted(pages)}, not {page}"

for word, page in FIRST.items():
    pages = {index["docnames"][entry[0]] for entry in index["indexentries"].get(word, [])}
    assert pages == {page}, f"the search for {word!r} begins with {sorted(pages)}, not {page}"
searched = {number for hits in index["terms"].values() for number in (hits if isinstance(hits, list) else [hits])}
assert not {index["docnames"][number] for number in searched} & {*HISTORY}, f"the search reads one of {HISTORY}"

reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
for module in PUBLIC:
    for name in import_module(module).__all__:
        shown = f'id="{module}.{name}"' in reference or f'id="mixture_of_experts.{name}"' in reference
        assert shown, f"{module}.{name} is public: a page of docs/api has to show it"

for name in ("MoE", "HeirarchicalMoE", "RoutedExperts"):
    (signature,) = re.findall(rf'<dt class="[^"]*" id="mixture_of_experts\.{name}">(.*?)</dt>', reference, re.DOTALL)
    assert ">kwargs<" not in signature, f"the signature of {name} is that of its base class"
    assert name == "RoutedExperts" or ">dim<" in signature, f"the signature of {name} has no arguments"
for private in ("NO_EPSILON", "&lt;factory&gt;", "object at 0x"):
    assert private not in reference, f"a signature shows {private}"

pages = [page for page in site.rglob("*.html") if "_static" not in page.parts]
for page in pages:
    for source in re.findall(r'<img [^>]*src="(?!https?:|data:)([^"]+)"', page.read_text(encoding="utf-8")):
        assert (page.parent / source).is_file(), f"{page.name} shows {source}, which is not there"
print(f"{len(pages)} pages; the search finds {', '.join(ASKED_FOR)}")
