"""Defines providers, which describe modules from other libraries.

This package supports its own modules and PyTorch's modules directly. For models that contain modules from other
libraries, functions that act on whole models, such as `track_routing`, query a provider, which finds modules that call
routers, wrap other modules, or receive arguments that describe tokens. The providers for a module are those registered
for the top-level packages that define its class and base classes. The providers for `BUNDLED_LIBRARIES` are defined in
`mixture_of_experts.huggingface` and imported when a module from one of these libraries is first encountered. Call
`register_provider` to add more providers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

AnswerT = TypeVar("AnswerT")

ROUTER_SCORES = ("softmax", "sigmoid", "sqrt_softplus")
ROUTER_RESULTS = ("logits", "probs", "weights", "experts", None)
BUNDLED_LIBRARIES = ("transformers", "peft")
# module that defines `PROVIDERS`, a dict keyed by library
BUNDLED_MODULE = "mixture_of_experts.huggingface.providers"


class ExternalRouter:
    """Describes the settings and return values of another library's router, which chooses k experts for each token.

    The router's block is the module that calls it. `Provider.find_router` returns this object for the block. Subclasses
    may implement settings as properties that read them from the block.

    Args:
        path: path of the router relative to the block.
        num_experts: number of experts that the router scores.
        k: number of choices per token.
        settings: values for any of the attributes listed below.

    Attributes:
        returns: the values that the router returns for flattened tokens `(t, ...)`, in order. Each is "logits",
            "probs", "weights", "experts", or None for any other value. The router may return additional values at the
            end. If "experts" is missing, the experts with the largest logits are chosen.
        score: the function that computes probabilities from logits: "softmax", "sigmoid" or "sqrt_softplus".
        experts_path: path of the experts relative to the block.
        expert_bias: the tensor that `balance_experts` updates to influence which experts are chosen, or None. Implement
            it as a property if the model may be moved to another device.
        capacity: number of slots per expert and sequence, or None if the router is dropless.
        group_sizes: the number of expert groups and the number of groups that a token may use, or (None, None) if there
            are no groups.
        zero_weight_expert: the expert that replaces choices with weight 0, or None to keep such choices.
        chooses_by_token_ids: whether experts are looked up in a table by token id.
        remedy: advice for the error message that is raised if a feature does not support the router.
        aux_loss_remedy: how to obtain the router's auxiliary loss. `collect_aux` includes it in its error message.
    """

    path: str
    num_experts: Any
    k: Any
    returns: tuple[str | None, ...] = ("logits", "weights", "experts")
    score: Any = "softmax"
    experts_path: str = "experts"
    expert_bias: Any = None
    capacity: Any = None
    group_sizes: Any = (None, None)
    zero_weight_expert: Any = None
    chooses_by_token_ids: Any = False
    remedy: str = "leave it out of gates="
    aux_loss_remedy: str = "leave it out of gates="

    def __init__(self, path: str, *, num_experts: int, k: int, **settings: Any) -> None:
        if unknown := sorted(name for name in settings if name not in ExternalRouter.__annotations__):
            known = ", ".join(ExternalRouter.__annotations__)
            raise TypeError(f"ExternalRouter has no setting {unknown[0]!r}; available settings are {known}")
        vars(self).update(path=path, num_experts=num_experts, k=k, **settings)
        if self.score not in ROUTER_SCORES or not {*self.returns} <= {*ROUTER_RESULTS}:
            raise ValueError(
                f"`score` must be one of {ROUTER_SCORES}, and `returns` must contain only {ROUTER_RESULTS}, but got "
                f"score={self.score!r} and returns={self.returns!r}"
            )
        if not {"logits", "probs"} & {*self.returns} or ("probs" in self.returns and self.score != "softmax"):
            raise ValueError(
                f"`returns` must contain 'logits', or 'probs' if score='softmax', but got returns={self.returns!r} "
                f"and score={self.score!r}"
            )

    def check_rule(self, rule: Any, name: str) -> None:
        """Raise a ValueError if an expert-bias rule does not support the router named `name`."""
        if rule.reads_scores:
            raise ValueError(
                f"{rule!r} reads scores, which the router {name!r} does not return; use rule='sign', or {self.remedy}"
            )


class TokenMetadata(NamedTuple):
    """Information about the tokens in a forward pass, extracted from the model's arguments."""

    mask: Tensor | None = None  # (b, n) bool, True for real tokens; None if all tokens are real
    shape: tuple[int, int] | None = None  # (b, n), or None if unknown
    mask_unknown_reason: str | None = None  # why the mask is unknown
    ids: Tensor | None = None  # (b, n) integer token ids; None if the model received embeddings
    segment_ids: Tensor | None = None  # (b, n) integer document ids of packed rows; None if rows are not packed


class TokensReader:
    """Extracts token metadata from the arguments of a model's forward pass. The base class extracts nothing."""

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenMetadata:
        """Return the metadata of the tokens in a forward pass with these arguments."""
        return TokenMetadata()

    def read_cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor | int | None]:
        """Return the cache in these arguments (or None) and the number of real tokens in the cache. The number is
        either a tensor `(b,)` or an integer that applies to all sequences, or None if the arguments do not determine
        it."""
        return None, 0

    def get_cached_length(self, cache: Any) -> int | None:
        """Return the number of tokens in a cache, including padding, or None if it is unknown."""
        return None

    def get_cached_keys(self, cache: Any) -> Tensor | None:
        """Return a tensor that the cache replaces when its sequences are reordered, or None if there is no such
        tensor."""
        return None


class Provider:
    """Describes the modules of one library. The default methods provide no information, so subclasses override them."""

    gate_remedy: str | None = None  #: advice for the error that is raised if the sizes of the gate and its layer differ

    def find_router(self, block: nn.Module) -> ExternalRouter | None:
        """Return the router that a module calls, or None if it does not call one."""
        return None

    def find_experts(self, module: nn.Module) -> nn.Module | None:
        """Return a module's experts, even if its router is unknown, or None if it has no experts."""
        return None

    def get_wrapped_module(self, module: nn.Module) -> nn.Module | None:
        """Return the module inside a wrapper, or None if the module is not a wrapper."""
        return None

    def list_children(self, module: nn.Module) -> list[tuple[nn.Module, bool]] | None:
        """Return a module's direct children and whether its computation uses each of them, or None if it uses all of
        them."""
        return None

    def find_enclosing_model(self, modules: Sequence[nn.Module]) -> nn.Module | None:
        """Return the module whose arguments describe the tokens that the innermost module receives, or None if it is
        unknown. The modules are nested, with the outermost module first."""
        return None

    def make_tokens_reader(self, model: nn.Module) -> TokensReader | None:
        """Return a `TokensReader` for a model, or None if its arguments are unknown. The model may come from another
        library."""
        return None

    def is_tokenwise(self, module: nn.Module) -> bool | None:
        """Return whether a module processes each row independently, using only torch operators whose result for a row
        does not depend on the rest of the batch. The module's children are checked separately."""
        return None

    def is_linear(self, module: nn.Module) -> bool | None:
        """Return whether a module multiplies each token by its weight matrices."""
        return None

    def unsaved_reason(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
        """Return a warning if any of `tensors`, which are updated during training, will not be saved, or None if all of
        them will be saved."""
        return None


#: Providers, keyed by library. Like custom operators and pickling functions, they are registered process-wide when a
#: library is imported, and never during a forward pass.
REGISTERED_PROVIDERS: dict[str, Provider] = {}
#: providers for `BUNDLED_LIBRARIES`; `load_bundled_providers` fills this dict once
BUNDLED_PROVIDERS: dict[str, Provider] = {}


def register_provider(library: str, provider: Provider) -> None:
    """Register the provider for a library in the current process, replacing any previous provider for it.

    Args:
        library: name of the top-level package that defines the classes.
        provider: an instance of a subclass of `Provider`.

    Example:
        >>> import torch
        >>> from mixture_of_experts.providers import ExternalRouter, Provider, register_provider
        >>> class AcmeProvider(Provider):
        ...     def find_router(self, block):
        ...         if type(block).__name__ == "AcmeBlock":
        ...             return ExternalRouter("router", num_experts=block.num_experts, k=block.top_k)
        >>> register_provider("acme", AcmeProvider())
    """
    if not (isinstance(library, str) and library.isidentifier()):
        raise ValueError(f"library must be the name of a top-level package, such as 'torch', but got {library!r}")
    if not isinstance(provider, Provider):
        raise TypeError(f"provider must be an instance of a subclass of Provider, but got {provider!r:.99}")
    REGISTERED_PROVIDERS[library] = provider


def find_providers(module: nn.Module) -> list[Provider]:
    """Return the providers of the libraries that define a module's class and base classes, in method resolution
    order."""
    found: list[Provider] = []
    for library in dict.fromkeys([kind.__module__.partition(".")[0] for kind in type(module).__mro__]):
        if library in REGISTERED_PROVIDERS:
            found.append(REGISTERED_PROVIDERS[library])
        elif library in BUNDLED_LIBRARIES and load_bundled_providers():
            found.append(BUNDLED_PROVIDERS[library])
    return found


def ask_providers(module: nn.Module, question: Callable[[Provider], AnswerT | None]) -> AnswerT | None:
    """Return the first answer from a module's providers that is not None, or None if no provider has an answer."""
    for provider in find_providers(module):
        if (answer := question(provider)) is not None:
            return answer
    return None


def load_bundled_providers() -> bool:
    """Import the bundled providers and return True.

    Call this function before reading `BUNDLED_PROVIDERS`, because a traced graph would not reflect later changes to it.
    """
    if not BUNDLED_PROVIDERS:
        try:
            BUNDLED_PROVIDERS.update(import_module(BUNDLED_MODULE).PROVIDERS)
        except ImportError as error:
            raise ImportError(
                f"cannot import {BUNDLED_MODULE}, which describes the modules of {' and '.join(BUNDLED_LIBRARIES)}; "
                "install the versions required by this package's 'hf' extra"
            ) from error
    return True


def list_providers() -> list[Provider]:
    """Return all registered providers, including the bundled ones if a supported version of their libraries is
    imported."""
    if any(library in sys.modules for library in BUNDLED_LIBRARIES):
        with suppress(ImportError):
            load_bundled_providers()
    return list({**BUNDLED_PROVIDERS, **REGISTERED_PROVIDERS}.values())
