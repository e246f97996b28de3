"""Providers: the package knows no other library, and acts on routers of any library that a provider describes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixture_of_experts
from mixture_of_experts import MoE, TopKGating, balance_experts, collect_aux, control_sparsity, force_routing, providers
from mixture_of_experts.gating.steps import SCORES
from mixture_of_experts.providers import (
    ExternalRouter,
    Provider,
    TokenMetadata,
    TokensReader,
    find_providers,
    register_provider,
)
from mixture_of_experts.replay import record_routing, replay_routing
from mixture_of_experts.stats import routing_of, track_routing
from mixture_of_experts.summary import summary
from mixture_of_experts.verify.kinds import expected_failures

PACKAGE = Path(mixture_of_experts.__file__).parent
LIBRARY_NAMES = re.compile(r"transformers|peft|\btrl\b|hugging ?face", re.IGNORECASE)
#: the one line that maps libraries to the module that describes them, so that users need not import it
ALLOWED_LINES = {"providers.py": ['BUNDLED_LIBRARIES = ("transformers", "peft")']}

B, N, D, E, K = 2, 5, 8, 4, 2


# ---- the package knows no other library ----


def test_only_huggingface_names_the_libraries_that_it_describes():
    """Neither in code nor in strings, docstrings or comments. Pointers to `mixture_of_experts.huggingface` are none."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] == "huggingface":
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            if LIBRARY_NAMES.search(line.replace("mixture_of_experts.huggingface", "")):
                found.setdefault(place.as_posix(), []).append(line.strip())
    assert found == ALLOWED_LINES


@pytest.mark.parametrize(
    "line", ["from peft import x", "# as in transformers", '"from_transformers"', "Hugging Face", "TRL"]
)
def test_detects_names_of_libraries(line: str):
    assert LIBRARY_NAMES.search(line)
    assert not LIBRARY_NAMES.search("nn.TransformerEncoder, control, patrol")


LOADED = """
import sys
def loaded():
    return sorted(name for name in sys.modules if name.startswith(("mixture_of_experts.huggingface", "transformers")))
"""
IMPORTS = """
from pathlib import Path
from importlib import import_module
import mixture_of_experts
folder = Path(mixture_of_experts.__file__).parent
for path in sorted(folder.rglob("*.py")):
    parts = path.relative_to(folder).with_suffix("").parts
    optional = parts[0] in ("huggingface", "kernels") or "triton" in parts or parts[-1].startswith("__")
    if not optional:
        import_module(".".join(("mixture_of_experts", *parts)))
"""
USES = """
import torch
from mixture_of_experts import MoE
from mixture_of_experts.stats import track_routing
from mixture_of_experts.summary import summary
moe = MoE(8, 4)
with track_routing(torch.nn.Sequential(moe)) as stats:
    pass
summary(moe)
"""


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return done.stdout.split()


@pytest.mark.slow
def test_imports_and_plain_models_load_no_module_of_huggingface():
    assert run_python(f"{LOADED}{IMPORTS}{USES}print(*loaded())") == []


@pytest.mark.slow
def test_plain_models_load_nothing_where_transformers_is_imported():
    pytest.importorskip("transformers")
    code = f"import transformers\n{LOADED}before = loaded(){IMPORTS}{USES}print(*{{*loaded()}} - {{*before}})"
    assert [name for name in run_python(code) if name.startswith("mixture_of_experts")] == []


STOCK = """
import sys, torch
from transformers import MixtralConfig, MixtralForCausalLM
import mixture_of_experts
from mixture_of_experts.stats import track_routing
model = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4))
print("mixture_of_experts.huggingface" in sys.modules)
mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
with track_routing(model) as stats:
    model(torch.randint(64, (2, 4)), attention_mask=mask)
print(stats.layers[0], stats.last(stats.layers[0]).tokens)
"""


@pytest.mark.slow
def test_a_stock_model_needs_no_import_of_huggingface():
    pytest.importorskip("transformers")
    assert run_python(STOCK) == ["False", "model.layers.0.mlp.gate", "7"]


COMPILED = """
import sys, torch
from peft import LoraConfig, get_peft_model
from torch import nn
from mixture_of_experts import MoE, TopKGating

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.moe = nn.Linear(8, 8), MoE(8, gate=TopKGating(8, 4))

    def forward(self, x, given):
        return self.moe(self.up(x), given_experts=given)[0]

model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["up"], modules_to_save=["gate"]))
x, given = torch.randn(2, 5, 8), torch.arange(20).view(2, 5, 2) % 4
compiled = torch.compile(model, backend="eager", fullgraph=True)
print("mixture_of_experts.huggingface" in sys.modules)
out = compiled(x, given)
print("mixture_of_experts.huggingface" in sys.modules, torch.allclose(out, model(x, given), atol=1e-5))
"""


@pytest.mark.slow
def test_adapters_are_first_met_while_a_graph_is_traced():
    pytest.importorskip("peft")
    assert run_python(COMPILED) == ["False", "True", "True"]


# ---- a library of its own ----


class AcmeRouter(nn.Module):
    """A router of a made-up library."""

    __module__ = "acme.routers"
    expert_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, E))
        self.register_buffer("expert_bias", torch.zeros(E))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.weight
        scores = logits.sigmoid()
        expert = torch.topk(scores + self.expert_bias, K, dim=-1).indices
        return logits, expert, scores.gather(-1, expert)


class AcmeExperts(nn.Module):
    __module__ = "acme.experts"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D, D))

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("td,tkdo,tk->to", x, self.weight[expert], weight)


class AcmeBlock(nn.Module):
    __module__ = "acme.blocks"

    def __init__(self) -> None:
        super().__init__()
        self.router, self.networks = AcmeRouter(), AcmeExperts()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        _, expert, weight = self.router(flat)
        return self.networks(flat, expert, weight).view_as(x)


class AcmeModel(nn.Module):
    __module__ = "acme.models"

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AcmeBlock() for _ in range(2))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class AcmeRouterSettings(ExternalRouter):
    """Reads the bias whenever it is needed."""

    def __init__(self, block: AcmeBlock) -> None:
        settings: dict[str, Any] = dict(
            returns=("logits", "experts", "weights"), score="sigmoid", experts_path="networks"
        )
        super().__init__("router", num_experts=E, k=K, **settings)
        self.block = block

    @property
    def expert_bias(self) -> Tensor:
        return self.block.router.expert_bias


class PaddingReader(TokensReader):
    def __call__(self, args: Any, kwargs: Any) -> TokenMetadata:
        padding = kwargs.get("padding")
        return TokenMetadata(shape=tuple(args[0].shape[:2]), mask=None if padding is None else ~padding)


class AcmeProvider(Provider):
    def find_router(self, block: nn.Module) -> ExternalRouter | None:
        return AcmeRouterSettings(block) if isinstance(block, AcmeBlock) else None

    def find_enclosing_model(self, modules: Any) -> nn.Module | None:
        return next((module for module in modules if isinstance(module, AcmeModel)), None)

    def make_tokens_reader(self, model: nn.Module) -> TokensReader | None:
        return PaddingReader() if isinstance(model, AcmeModel) else None


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> AcmeModel:
    monkeypatch.setattr(providers, "REGISTERED_PROVIDERS", {})
    register_provider("acme", AcmeProvider())
    torch.manual_seed(0)
    return AcmeModel()


LAYERS = ("blocks.0.router", "blocks.1.router")


def test_five_lines_describe_a_router(monkeypatch: pytest.MonkeyPatch):
    """As the page on extending has them: nothing but the router is described."""
    monkeypatch.setattr(providers, "REGISTERED_PROVIDERS", {})
    model, x = AcmeModel(), torch.randn(B, N, D)
    with pytest.raises(ValueError, match="AcmeModel has no gate"):
        track_routing(model).__enter__()

    class FiveLines(Provider):
        def find_router(self, block):
            if isinstance(block, AcmeBlock):
                return ExternalRouter("router", num_experts=E, k=K, returns=("logits", "experts", "weights"))
            return None

    register_provider("acme", FiveLines())
    with track_routing(model) as stats:
        model(x)
    assert stats.layers == LAYERS
    assert stats.last(LAYERS[1]).tokens == B * N


def test_statistics_and_padding(acme: AcmeModel):
    x, padding = torch.randn(B, N, D), torch.zeros(B, N, dtype=torch.bool)
    padding[0, :2] = True
    routing = routing_of(acme, x, padding=padding)
    first = routing[LAYERS[0]]
    logits, expert, weight = acme.blocks[0].router(x.flatten(0, 1))
    assert first.expert.view(-1, K).equal(expert.where(~padding.view(-1, 1), 0))
    torch.testing.assert_close(first.weight.view(-1, K), weight.masked_fill(padding.view(-1, 1), 0.0))
    torch.testing.assert_close(first.probs, (s := logits.sigmoid().view(B, N, E)) / s.sum(-1, keepdim=True))
    with track_routing(nn.Sequential(acme)) as stats:  # in a model of nobody's library
        acme(x, padding=padding)
    assert stats.layers == tuple(f"0.{name}" for name in LAYERS)
    assert stats.last("0.blocks.1.router").tokens == B * N - 2


@pytest.mark.parametrize("returns", [("logits", "experts"), ("probs", "experts"), ("logits", "weights"), ("probs",)])
def test_routers_that_return_less(returns, monkeypatch: pytest.MonkeyPatch):
    class Softmax(AcmeRouter):
        def forward(self, x: Tensor) -> Any:
            logits = x @ self.weight
            weight, expert = (probs := logits.softmax(-1)).topk(K, dim=-1)
            found = dict(logits=logits, probs=probs, experts=expert, weights=2 * weight)
            return tuple(found[name] for name in returns)

    class SoftmaxProvider(Provider):
        def find_router(self, block: nn.Module) -> ExternalRouter | None:
            is_block = isinstance(block, AcmeBlock)
            return ExternalRouter("router", num_experts=E, k=K, returns=returns) if is_block else None

    monkeypatch.setattr(providers, "REGISTERED_PROVIDERS", {})
    register_provider("acme", SoftmaxProvider())
    block, x = AcmeBlock(), torch.randn(1, N, D)
    block.router = Softmax()
    monkeypatch.setattr(AcmeBlock, "forward", lambda self, x: (self.router(x.flatten(0, -2)), x)[1])
    routing = routing_of(block, x)["router"]
    weight, expert = (x[0] @ block.router.weight).softmax(-1).topk(K, dim=-1)
    assert torch.equal(routing.expert.view(N, K), expert)
    torch.testing.assert_close(routing.weight.view(N, K), 2 * weight if "weights" in returns else weight)


def test_forcing(acme: AcmeModel):
    x = torch.randn(B, N, D)
    with force_routing(acme, "balanced"):
        chosen = acme.blocks[0].router(x.flatten(0, 1))[1]
    assert chosen.flatten().tolist() == [i % E for i in range(B * N * K)]


def test_balancing(acme: AcmeModel):
    """The bias moves by the counts of real tokens, and follows the model to another dtype."""
    optimizer = torch.optim.SGD(acme.parameters(), lr=0.0)
    x, padding = torch.randn(B, N, D), torch.zeros(B, N, dtype=torch.bool)
    padding[1] = True
    with balance_experts(acme, optimizer, rate=0.1) as balancing:
        assert balancing.gates == LAYERS
        acme.double()
        chosen = acme.blocks[0].router(x[0].double())[1]
        acme(x.double(), padding=padding).sum().backward()
        optimizer.step()
    load = chosen.flatten().bincount(minlength=E).double()
    torch.testing.assert_close(acme.blocks[0].router.expert_bias, 0.1 * (load.mean() - load).sign())
    with pytest.raises(ValueError, match=r"QuantileRule.* reads scores, which the router 'blocks.0.router' does not"):
        balance_experts(acme, optimizer, "quantile")


def test_balancing_needs_choices_and_weights(acme: AcmeModel, monkeypatch: pytest.MonkeyPatch):
    found = AcmeProvider.find_router

    def find_router(self, block):
        if (router := found(self, block)) is not None:
            router.returns = ("logits",)
        return router

    monkeypatch.setattr(AcmeProvider, "find_router", find_router)
    optimizer, hooks = torch.optim.SGD(acme.parameters(), lr=0.0), acme.blocks[0].router._forward_hooks
    with pytest.raises(TypeError, match=r"'blocks.0.router' \(AcmeRouter\), .* not return experts and weights"):
        balance_experts(acme, optimizer)
    assert not hooks


def test_replay(acme: AcmeModel):
    x, other = torch.randn(B, N, D), torch.randn(B, N, D)
    with record_routing(acme) as records:
        acme(x)
    assert records.layers == LAYERS
    assert records.lengths(LAYERS[0]) == [N] * B
    with replay_routing(acme, records):
        replayed = routing_of(acme, other)
    recorded = torch.stack([each.long() for each in records[LAYERS[0]]])
    assert replayed[LAYERS[0]].expert.view(B, N, K).equal(recorded)
    with pytest.raises(TypeError, match=r"its own code computes the weights; leave it out of gates="):
        record_routing(acme, weights=True).__enter__()


def test_summary_counts_a_share_of_the_experts(acme: AcmeModel):
    cost = summary(acme)
    assert cost.parameters == 2 * (D * E + E * D * D)
    assert cost.active == 2 * (D * E + K * D * D)
    assert cost.flops == 2 * cost.active


def test_features_that_support_no_such_router(acme: AcmeModel):
    model = nn.ModuleList([acme, MoE(D, gate=TopKGating(D, E))])
    with pytest.raises(TypeError, match=r"returns no auxiliary loss; leave it out of gates=.*gates=\['1.gate'\]"):
        collect_aux(model).__enter__()
    with pytest.raises(ValueError, match="has no ReLUGating"):
        control_sparsity(acme, torch.optim.SGD(acme.parameters(), lr=0.1))
    assert expected_failures(acme).keys() == {"router_bfloat16", "router_autocast"}


def test_subclasses_belong_to_the_library_of_their_base(acme: AcmeModel):
    """Each library in the order of the bases is asked, until one has an answer."""

    class GlobexBlock(AcmeBlock):
        __module__ = "globex.blocks"

    class Mine(GlobexBlock):
        pass

    class GlobexProvider(Provider):
        pass

    register_provider("globex", GlobexProvider())
    assert [type(each) for each in find_providers(Mine())] == [GlobexProvider, AcmeProvider]
    assert find_providers(nn.Linear(1, 1)) == []
    assert list(routing_of(nn.Sequential(Mine()), torch.randn(B, N, D))) == ["0.router"]


class AcmeWrapper(nn.Module):
    __module__ = "acme.wrappers"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_wrappers_of_a_library(monkeypatch: pytest.MonkeyPatch):
    class Wrapping(Provider):
        def get_wrapped_module(self, module):
            return module.inner if isinstance(module, AcmeWrapper) else None

    monkeypatch.setattr(providers, "REGISTERED_PROVIDERS", {})
    moe = MoE(D, gate=TopKGating(D, E))
    moe.gate = AcmeWrapper(moe.gate)
    register_provider("acme", Wrapping())
    assert [*routing_of(moe, torch.randn(B, N, D))] == ["gate"]


def test_rejects_wrong_providers_and_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(providers, "REGISTERED_PROVIDERS", {})
    with pytest.raises(ValueError, match=r"library must be the name of a top-level package.*got 'acme.blocks'"):
        register_provider("acme.blocks", AcmeProvider())
    with pytest.raises(TypeError, match="provider must be an instance of a subclass of Provider, but got <class"):
        register_provider("acme", AcmeProvider)  # type: ignore[arg-type]
    assert providers.REGISTERED_PROVIDERS == {}
    with pytest.raises(TypeError, match=r"ExternalRouter has no setting 'top_k'; available settings are path"):
        ExternalRouter("router", num_experts=E, k=K, top_k=2)
    for wrong in (dict(score="tanh"), dict(returns=("logits", "indices"))):
        with pytest.raises(ValueError, match=rf"`score` must be one of .* got .*{next(iter(wrong))}="):
            ExternalRouter("router", num_experts=E, k=K, **wrong)
    for wrong in (dict(returns=("weights", "experts")), dict(returns=("probs",), score="sigmoid")):
        with pytest.raises(ValueError, match="`returns` must contain 'logits', or 'probs' if score='softmax'"):
            ExternalRouter("router", num_experts=E, k=K, **wrong)
    assert {*providers.ROUTER_SCORES} == {*SCORES}


def test_bundled_providers_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch):
    """An unsupported version of a library: its modules raise with the remedy, and models of other classes work."""

    class Stock(nn.Sequential):
        __module__ = f"{providers.BUNDLED_LIBRARIES[0]}.models"

    monkeypatch.setattr(providers, "BUNDLED_PROVIDERS", {})
    monkeypatch.setattr(providers, "BUNDLED_MODULE", "mixture_of_experts.huggingface.no_such_module")
    monkeypatch.setitem(sys.modules, providers.BUNDLED_LIBRARIES[0], sys)
    moe = MoE(D, gate=TopKGating(D, E))
    with record_routing(moe) as records:
        moe(torch.randn(B, N, D))
    assert records.layers == ("gate",)
    with pytest.raises(ImportError, match=r"cannot import .* modules of transformers and peft; .*'hf' extra"):
        track_routing(Stock(moe)).__enter__()


def test_a_router_that_returns_something_else(acme: AcmeModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AcmeRouter, "forward", lambda self, x: (x, x))
    with (
        pytest.raises(TypeError, match=r"AcmeRouter must return \(logits, experts, weights\)"),
        track_routing(acme),
    ):
        acme.blocks[0].router(torch.randn(3, D))
