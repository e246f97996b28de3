"""Replaces the feed-forward networks of a loaded model with `MoE` layers. The experts are newly initialized or are
copies of the original networks.

Axes: d (model dimension), h (hidden dimension), e (experts), g (slices per network).
"""

from __future__ import annotations

import copy
import numbers
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.experts import Experts, GatedExperts
from mixture_of_experts.gating import TopKGating
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward, find_feed_forwards
from mixture_of_experts.huggingface.model_watch import uses_model_mask, watch_model
from mixture_of_experts.huggingface.private_transformers import clear_gguf_quantizer, remove_capturing_hooks
from mixture_of_experts.huggingface.replacement.dense_ffn import (
    Adapter,
    DenseFFN,
    NetworkLocation,
    call_or_none,
    check_not_packed,
    check_not_wrapped,
    eval_mode,
    read_dense_ffn,
)
from mixture_of_experts.huggingface.replacement.network_search import (
    PATH_NUMBER,
    UnsupportedNetwork,
    has_experts,
    search_networks,
)
from mixture_of_experts.huggingface.replacement.torch_layers import disable_fused_path, find_torch_layers
from mixture_of_experts.huggingface.replacement.weight_sums import get_constant_weight_sum
from mixture_of_experts.huggingface.router_config import add_router_config
from mixture_of_experts.huggingface.saving.configuration import store_layers_in_config
from mixture_of_experts.huggingface.saving.layer_settings import GateFactory
from mixture_of_experts.huggingface.saving.weight_names import keep_names_on_saving
from mixture_of_experts.moe import MoE
from mixture_of_experts.recipes import SharedExpert
from mixture_of_experts.support.checks import check_model, check_number, check_optional_size, check_size
from mixture_of_experts.support.private_torch import move_hooks

#: hidden-unit axis of each weight in a network
HIDDEN_AXIS = {"w1": 1, "w3": 1, "b1": 0, "b3": 0, "w2": 0}
LayerSelection = Iterable[str | int] | Callable[[str], bool] | None


def replace_ffn(
    model: nn.Module,
    num_experts: int = 8,
    k: int = 2,
    *,
    layers: LayerSelection = None,
    gate: GateFactory | None = None,
    hidden_dim: int | None = None,
    shared_expert: int | None = None,
    loss_coef: float = 1e-2,
    z_loss_coef: float = 0.0,
    loss_coefs: Mapping[str, float] | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> list[str]:
    """Replace a model's feed-forward networks in place with `MoE` layers whose experts are newly initialized.

    The experts have the same activation, biases, dropout, dtype and device as the original networks. The model's norms,
    residual connections and return types are unchanged. All losses and statistics ignore padding. If labels are passed
    during training, the model's loss includes the auxiliary loss (see `aux_loss`). The layers' weights are new tensors,
    so construct the optimizer afterwards. If you want to add PEFT adapters, first save the model and load it again,
    because adapter files do not include the routers.

    Args:
        model: a `transformers` model. Pass the model that computes the training loss, before wrapping it (PEFT,
            `torch.compile`, DDP).
        num_experts: number of experts in each layer.
        k: number of experts per token. Used only by the default gate.
        layers: the networks to replace, specified as block numbers, names (as returned by this function), or a
            predicate on names. Default: all networks.
        gate: a function `(dim, num_experts)` that returns a new gate for each layer. Default:
            `TopKGating(dim, num_experts, k)`, which does not drop any tokens. Gates that read `token_ids`, such as
            `HashGating`, receive the model's `input_ids`.
        hidden_dim: hidden dim of each expert. Default: the hidden dim of the original network.
        shared_expert: hidden dim of a newly initialized shared expert, which processes every token. Default: no shared
            expert.
        loss_coef, z_loss_coef, loss_coefs: coefficients of the auxiliary losses; see `MoE`.
        adapters: adapters for networks that are not found automatically, keyed by the class name of the network's
            module.

    Returns:
        The paths of the new layers in the model.

    Raises:
        ValueError: the model has no feed-forward networks or none that match `layers` (the error lists the available
            networks), the model is a wrapper, a network shares weights with another module, `gate` returned the same
            gate for two layers, or a size is not a positive integer.
        TypeError: a network has linear layers that are quantized or sharded or have adapters, `gate` is not a function
            `(dim, num_experts)` that returns a gate, or `layers` contains elements other than numbers and names.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from mixture_of_experts.huggingface import replace_ffn
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
        >>> replace_ffn(model, num_experts=4, layers=[1])
        ['transformer.h.1.mlp']
        >>> tokens = torch.randint(64, (2, 10))
        >>> model(tokens, labels=tokens).loss.backward()
    """
    coefs = dict(loss_coef=loss_coef, z_loss_coef=z_loss_coef, loss_coefs=loss_coefs)
    check_size("num_experts", num_experts)
    check_optional_size("hidden_dim", hidden_dim)
    check_optional_size("shared_expert", shared_expert)
    make_gate = make_gate_factory(gate, k, model)

    def build(_location: NetworkLocation, dense: DenseFFN) -> MoE:
        return build_moe(dense, num_experts, make_gate, hidden_dim or dense.hidden_dim, coefs, shared_expert)

    return replace_networks(model, find_networks(model, layers, adapters), build)


def upcycle(
    model: nn.Module,
    num_experts: int = 8,
    k: int = 2,
    *,
    layers: LayerSelection = None,
    gate: GateFactory | None = None,
    granularity: int = 1,
    shared_expert: int | None = None,
    noise: float = 0.0,
    redraw: float = 0.0,
    loss_coef: float = 1e-2,
    z_loss_coef: float = 0.0,
    loss_coefs: Mapping[str, float] | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> list[str]:
    """Replace a model's feed-forward networks with `MoE` layers whose experts are initialized as copies of these
    networks (arXiv 2212.05055).

    Before training, the upcycled model returns the same outputs as the original model up to rounding, unless `noise` or
    `redraw` is used. This requires that the gate's router weights have the same sum for every token, and that the gate
    does not drop tokens in eval mode. Experts copied from frozen weights (`requires_grad=False`) are also frozen, but
    routers are trainable. As with `replace_ffn`, construct the optimizer and add PEFT adapters afterwards.

    With `granularity=g`, each expert is a slice of the network with `h / g` hidden units (arXiv 2410.07524). Experts
    `g i` to `g i + g - 1` are the slices of copy i. All slices of a copy start with equal router weights, so that
    tokens choose them together. Therefore, `num_experts` and the gate's number of choices must be multiples of g.

    Args:
        granularity: number of slices g into which each copy is divided.
        shared_expert: number of hidden units that are moved to a shared expert, which processes every token. The shared
            expert contains the first hidden units of the network, and the other experts are copies of the remaining
            hidden units.
        noise: standard deviation of Gaussian noise that is added to the experts' weights, relative to the standard
            deviation of each weight tensor.
        redraw: fraction of each expert's hidden units that are reinitialized. Their weights are drawn from a normal
            distribution with the mean and standard deviation of the original weights (arXiv 2502.19261).
        others: see `replace_ffn`.

    Raises:
        ValueError, TypeError: as in `replace_ffn`. Also raised if the sum of the router weights varies between tokens
            (for example, with k = 1 and without normalization), if the gate drops tokens in eval mode, or if a size is
            not divisible by `granularity`.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from mixture_of_experts.huggingface import upcycle
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
        >>> tokens = torch.randint(64, (2, 10))
        >>> before = model(tokens).logits
        >>> names = upcycle(model, num_experts=4)
        >>> torch.testing.assert_close(model(tokens).logits, before, atol=1e-5, rtol=1e-5)
    """
    g = check_size("granularity", granularity)
    shared = check_optional_size("shared_expert", shared_expert)
    check_number("noise", noise, at_least=0.0)
    if check_number("redraw", redraw, at_least=0.0) > 1:
        raise ValueError(f"expected `redraw` to be a fraction from 0 to 1, but got {redraw!r}")
    if check_size("num_experts", num_experts) % g:
        raise ValueError(
            f"num_experts={num_experts} must be a multiple of granularity={g}, because each expert is a slice of a "
            "copied network"
        )
    coefs = dict(loss_coef=loss_coef, z_loss_coef=z_loss_coef, loss_coefs=loss_coefs)
    make_gate = make_gate_factory(gate, k, model)

    def build(_location: NetworkLocation, dense: DenseFFN) -> MoE:
        rest = dense.hidden_dim - (shared or 0)
        if rest < 1 or rest % g:
            raise ValueError(f"granularity={g} must divide the {rest} hidden units not used by shared_expert={shared}")
        moe: Any = build_moe(dense, num_experts, make_gate, rest // g, coefs, shared, init_weights=False)
        repeat_router_columns(moe.gate, g)
        fill_experts(moe.experts, dense, shared or 0, g, get_constant_weight_sum(moe, g))
        perturb_experts(moe.experts, noise, redraw)
        fill_shared_expert(moe.shared_expert, dense)
        return moe

    return replace_networks(model, find_networks(model, layers, adapters), build)


# Finding


def find_networks(
    model: nn.Module, layers: LayerSelection, adapters: Mapping[str, Adapter] | None
) -> list[NetworkLocation]:
    """Return the networks in a model that are selected by `layers`. Networks are located with `adapters` or by their
    structure."""
    check_not_wrapped(check_model("model", model))
    check_not_packed(model)
    adapters = {} if adapters is None else adapters
    if not isinstance(adapters, Mapping) or not all(isinstance(adapter, Adapter) for adapter in adapters.values()):
        raise TypeError(
            f"expected adapters to be a dict that maps class names to Adapter(...), but got {adapters!r:.99}"
        )
    known = find_torch_layers(model)
    known |= {n: adapters[type(m).__name__] for n, m in model.named_modules() if type(m).__name__ in adapters}
    check_not_chunked(model)
    locations, unsupported = search_networks(model, known)
    if not locations:
        raise ValueError(
            f"no feed-forward network was found in {type(model).__name__}{explain_unsupported(model, unsupported)}"
        )
    if layers is None and (unsupported or (unsupported := find_inconsistent_modules(model, locations))):
        some = ", ".join(dict.fromkeys(to_path_pattern(location.moe_path) for location in locations))
        raise ValueError(
            f"some feed-forward networks of {type(model).__name__} can be replaced ({some}), but others "
            f"cannot{explain_unsupported(model, unsupported)}, or use layers= to select the networks to replace"
        )
    chosen = select_layers([location.moe_path for location in locations], layers)
    return [location for location in locations if location.moe_path in chosen]


def explain_unsupported(model: nn.Module, unsupported: Collection[UnsupportedNetwork]) -> str:
    """Describe why networks in a model cannot be replaced, for use in an error message."""
    if unsupported:
        reasons = "; ".join(
            dict.fromkeys(
                f"{to_path_pattern(network.name)} of {network.class_name}: {network.reason}" for network in unsupported
            )
        )
    elif any(map(has_experts, model.modules())):
        reasons = "its blocks already have routers and experts"
    else:
        reasons = f"its modules are {', '.join(sorted({type(module).__name__ for module in model.modules()}))}"
    return f": {reasons}. Pass adapters={{class name: Adapter(...)}} to locate a network's parts"


def find_inconsistent_modules(model: nn.Module, locations: list[NetworkLocation]) -> list[UnsupportedNetwork]:
    """Return the modules in which no network was found, although modules of the same class in other blocks contain
    one."""
    found = {(to_path_pattern(location.name), type(location.module)) for location in locations}
    names = {location.name for location in locations}
    return [
        UnsupportedNetwork(name, type(module).__name__, "it differs from other modules of its class")
        for name, module in model.named_modules()
        if (to_path_pattern(name), type(module)) in found
        and name not in names
        and not any(map(has_experts, module.modules()))
    ]


def to_path_pattern(name: str) -> str:
    """Replace each number in a path with "*"."""
    return PATH_NUMBER.sub("*", name)


def check_not_chunked(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "chunk_size_feed_forward", 0):
            raise ValueError(
                f"{name} computes its feed-forward network in chunks, but the router requires whole sequences; set "
                "config.chunk_size_feed_forward = 0 before building the model"
            )


def select_layers(names: list[str], layers: LayerSelection) -> Collection[str]:
    """Return the names that `layers` selects. Raise ValueError if an entry of `layers` does not match any name."""
    if layers is None:
        return names
    requested: Any = layers
    is_sequence = isinstance(layers, Iterable) and not isinstance(layers, str) and getattr(layers, "ndim", 1)
    entries: list[Any] = list(requested) if is_sequence else [requested]
    if callable(layers) and not isinstance(layers, nn.Module | type):
        entries = list(filter(layers, names))
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, str | numbers.Integral):
            raise TypeError(
                "expected `layers` to contain block numbers (such as 1) or network names (as returned), or to be a "
                f"function of a name, but got {entry!r}; omit `layers` to replace all networks"
            )
    chosen = [name for name in names if name in entries or parse_block_number(name) in entries]
    unmatched = [entry for entry in entries if entry not in {*chosen, *map(parse_block_number, chosen)}]
    if unmatched or not chosen:
        raise ValueError(
            f"expected `layers` to select from the networks {', '.join(names)}, but it selected "
            f"{unmatched or 'none of them'}"
        )
    return chosen


def parse_block_number(name: str) -> int | None:
    """Return the first number in a path, which is the block number. Return None if the path contains no number."""
    match = PATH_NUMBER.search(name)
    return None if match is None else int(match[0])


# Building


def make_gate_factory(gate: GateFactory | None, k: int, model: nn.Module) -> GateFactory:
    """Wrap `gate` in a function that checks that every layer receives a new gate. If `gate` is None, the returned
    function constructs a `TopKGating`."""
    if gate is None:
        return lambda dim, num_experts: TopKGating(dim, num_experts, k)
    wanted = "expected gate to return a new gate for each layer, as lambda d, e: TopKGating(d, e, k=2) does"
    if isinstance(gate, nn.Module) or not callable(gate):
        raise TypeError(f"{wanted}, but got {gate!r}")
    taken = set(model.modules())

    def make(dim: int, num_experts: int) -> nn.Module:
        made = gate(dim, num_experts)
        if not isinstance(made, nn.Module):
            raise TypeError(f"{wanted}, but it returned {made!r}")
        if made in taken:
            raise ValueError(
                f"{wanted}, but it returned a {type(made).__name__} that the model or another layer already uses"
            )
        taken.add(made)
        return made

    return make


def build_moe(
    dense: DenseFFN,
    num_experts: int,
    make_gate: GateFactory,
    hidden_dim: int,
    coefs: dict[str, Any],
    shared: int | None = None,
    *,
    init_weights: bool = True,
) -> MoE:
    """Build a layer whose experts have the same architecture, device and dtype as a dense network. If `init_weights` is
    False, the experts are on the meta device."""
    kind = GatedExperts if dense.is_gated else Experts
    device, dtype, shared_expert = dense.reference_weight.device, dense.reference_weight.dtype, None
    with device if init_weights else torch.device("meta"):
        experts: Any = kind(dense.dim, num_experts, hidden_dim, dense.activation, bias=True, dtype=dtype)
        experts.is_transposed = True  # PEFT reads this attribute; True means that weights are (e, in, out)
        if shared is not None:
            # the shared expert must have its own dropout
            activation = copy.deepcopy(dense.activation)
            shared_expert = SharedExpert(
                dense.dim, shared, activation, dense.is_gated, bias="b1" in dense.weights, dtype=dtype
            )
    for name in experts._parameters.keys() - dense.weights.keys():
        experts.register_parameter(name, None)  # the network does not have this bias
    with device:
        gate = make_gate(dense.dim, num_experts)
        return MoE(dense.dim, num_experts, gate=gate, experts=experts, shared_expert=shared_expert, **coefs)


@torch.inference_mode(False)  # tensors created in inference mode cannot be trained
def replace_networks(
    model: nn.Module, locations: list[NetworkLocation], build: Callable[[NetworkLocation, DenseFFN], MoE]
) -> list[str]:
    """Replace networks with layers, and return the paths of the layers. All layers are built before the first layer is
    inserted, so that errors leave the model unchanged."""
    built = []
    check_not_tied(model, locations)
    for location in locations:
        dense = read_dense_ffn(location.module, location.adapter)
        if not location.adapter.slot:
            check_equivalent(location, dense)
        placeholder_path = "" if location.adapter.slot else location.adapter.linears()["1"]
        moe, masked = build(location, dense), uses_model_mask(model, location.moe_path)
        feed_forward = MoEFeedForward(moe, dense.output_dropout, masked=masked, replaced_path=placeholder_path)
        feed_forward.to(dense.reference_weight)
        built.append(feed_forward.train(location.module.training))
    for location, feed_forward in zip(locations, built, strict=True):
        insert_layer(model, location, feed_forward)
    names = [location.moe_path for location in locations]
    disable_fused_path(model)
    register_layers(model, names)
    return names


def register_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Register layers with the enclosing model.

    The model then supplies the layers' masks, adds their losses to its own loss, saves their weights under their own
    names, and describes them in its configuration.
    """
    for module in model.modules():
        clear_gguf_quantizer(module)
    watch_model(model, names)
    add_router_config(model, find_feed_forwards(model)[0].moe)
    store_layers_in_config(model)
    keep_names_on_saving(model)


@torch.no_grad()
def check_equivalent(location: NetworkLocation, dense: DenseFFN) -> None:
    """Raise ValueError if, for random tokens, a module's output differs from the output of the network read from it."""
    if dense.reference_weight.is_meta:
        return
    x = torch.randn(2, 3, dense.dim, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(
        dense.reference_weight
    )
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
    with eval_mode(location.module, dense.activation):  # an adapter may supply the activation module
        found, wanted = call_or_none(lambda: location.module(x)), dense.compute(x)
    if found is None or found.shape != wanted.shape or not (found - wanted).norm() <= tolerance * wanted.norm():
        raise ValueError(
            f"the output of {location.name} does not match {location.adapter}; either the adapter is wrong, or the "
            "module is not a feed-forward network that depends only on tokens"
        )


def insert_layer(model: nn.Module, location: NetworkLocation, feed_forward: MoEFeedForward) -> None:
    """Insert a layer into the model, and replace the network's other parts with identities."""
    adapter = location.adapter
    if not adapter.slot:
        replace_module(model, location.module, feed_forward)
        return
    if isinstance(dropout := adapter.hidden_dropout, str):
        off: Any = 0.0 if isinstance(attrgetter(dropout)(location.module), float | int) else nn.Identity()
        set_attribute(location.module, dropout, off)
    for path in adapter.bypass:
        set_attribute(location.module, path, One() if path == adapter.ones else nn.Identity())
    set_attribute(location.module, adapter.down, feed_forward)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module at all of its paths, and move its hooks to the new module. A network that several layers share
    is replaced with a single shared `MoE`."""
    remove_capturing_hooks(old)
    move_hooks(old, new)
    for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is old]:
        set_attribute(model, path, new)


def check_not_tied(model: nn.Module, locations: list[NetworkLocation]) -> None:
    """Raise ValueError if networks share weights with other modules, because the experts would not share these
    weights."""
    holders = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for location in locations:
        for path in location.adapter.linears().values():
            weights = location.module.get_submodule(path).parameters(recurse=False)
            if any(holders[id(weight)] > 1 for weight in weights):
                raise ValueError(
                    f"{location.name}.{path} shares its weight with another module, but the new experts would not "
                    "share it; untie one of them (weight = nn.Parameter(weight.clone())), or exclude both with layers="
                )


class One(nn.Module):
    """A module that returns 1 and replaces a module whose output is used as a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(())


def set_attribute(module: nn.Module, path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)


# Upcycling


def repeat_router_columns(gate: Any, g: int) -> None:
    """Copy the router's columns so that all g slices of a copy start with the same router weights."""
    if g == 1:
        return
    with torch.no_grad():
        for name, parameter in gate.named_parameters():
            if parameter.shape[-1] != gate.num_experts:
                raise ValueError(
                    f"granularity={g} requires gate weights whose last dimension is the number of experts, but {name} "
                    f"has shape {tuple(parameter.shape)}"
                )
            parameter.copy_(parameter[..., ::g].repeat_interleave(g, dim=-1))


@torch.no_grad()
def fill_experts(experts: Any, dense: DenseFFN, first: int, g: int, total: float) -> None:
    """Copy a slice of the network's hidden units to each expert.

    The hidden units from `first` onwards are divided into g slices, and expert i receives slice i mod g. The weights of
    the last layer are scaled to compensate for the router weights, whose sum is `total`. Frozen weights remain
    frozen.
    """
    e, h = experts.num_experts, experts.hidden_dim
    for name, _ in list(experts.named_parameters(recurse=False)):  # excludes parameters of the shared activation
        stack = torch.stack([select_hidden_units(dense, name, first + i % g * h, h) for i in range(e)])
        if name in ("w2", "b2"):  # every slice includes b2
            stack *= (g if name == "w2" else 1) / total
        setattr(experts, name, nn.Parameter(stack, dense.weights[name].requires_grad))


@torch.no_grad()
def fill_shared_expert(shared_expert: Any, dense: DenseFFN) -> None:
    """Copy the first hidden units of a network to a shared expert. The bias of the last layer is not copied, because
    the other experts contain it."""
    if shared_expert is None:
        return
    names = ("gate_proj", "down_proj", "up_proj") if dense.is_gated else ("up_proj", "down_proj")
    for number, name in enumerate(names, 1):
        layer, trains = getattr(shared_expert, name), dense.weights[f"w{number}"].requires_grad
        for kind, empty in list(layer.named_parameters()):
            key, value = f"{kind[0]}{number}", dense.reference_weight.new_zeros(empty.shape)
            if key in dense.weights and key != "b2":
                value.copy_(select_hidden_units(dense, key, 0, shared_expert.hidden_dim).t())
            setattr(layer, kind, nn.Parameter(value, trains))


def select_hidden_units(network: DenseFFN, name: str, start: int, number: int) -> Tensor:
    """Return the part of a weight or bias that belongs to a range of hidden units. `b2` does not depend on hidden units
    and is returned whole."""
    weight = network.weights[name]
    return weight.narrow(HIDDEN_AXIS[name], start, number) if name in HIDDEN_AXIS else weight


@torch.no_grad()
def perturb_experts(experts: Any, noise: float, redraw: float) -> None:
    """Make the copies differ: add noise to their weights, and reinitialize the same number of hidden units in each
    expert."""
    weights = {name: weight for name, weight in experts.named_parameters() if name.startswith("w")}
    for weight in weights.values() if noise else ():
        weight.add_(torch.randn_like(weight), alpha=noise * weight.float().std().item())
    if redraw:
        order = torch.rand(experts.num_experts, experts.hidden_dim, device=experts.w1.device).argsort(dim=-1)
        new = order < round(redraw * experts.hidden_dim)  # (e, h)
        for name, weight in weights.items():
            drawn: Tensor = torch.randn_like(weight) * weight.float().std() + weight.float().mean()
            weight.copy_(torch.where(new.unsqueeze(-1 if name == "w2" else 1), drawn.to(weight.dtype), weight))
