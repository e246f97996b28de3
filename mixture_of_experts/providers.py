"""Providers, which describe the modules of other libraries.

This package supports its own modules and those of torch directly. For modules of other libraries, features that act on
whole models query the library's provider: which modules call routers, wrap other modules, or receive arguments that
describe tokens. A module belongs to the top-level packages that define its class and its base classes. The providers of
`BUNDLED_LIBRARIES` are in `mixture_of_experts.huggingface` and are imported when a module of such a library is first
encountered. Call `register_provider` to add others.
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
BUNDLED_MODULE = "mixture_of_experts.huggingface.providers"  # this module defines `PROVIDERS`, a dict keyed by library


class ExternalRouter:
    """The settings and return values of a router in another library that chooses k experts for each token.

    The router's block is the module that calls it, and for which `Provider.find_router` returns this object. Subclasses
    may implement settings as properties that read them from the block.

    Args:
        path: path of the router relative to the block.
        num_experts: number of experts that the router scores.
        k: number of choices per token.
        settings: values of any of the other attributes.

    Attributes:
        returns: what the router returns for flattened tokens `(t, ...)`, in order: "logits" or "probs", "weights",
            "experts", or None for any other value. More values may follow. Without "experts", the experts with the
            largest logits are the choices.
        score: the function that computes probabilities from logits: "softmax", "sigmoid" or "sqrt_softplus".
        experts_path: path of the experts relative to the block.
        expert_bias: the tensor that `balance_experts` updates to influence which experts are chosen, or None. If the
            model may move to another device, implement it as a property.
        capacity: slots per expert and sequence; None if dropless.
        group_sizes: the number of expert groups, and how many of them a token may use; (None, None) without groups.
        zero_weight_expert: the expert that a choice with weight 0 selects; None if such choices are not special.
        chooses_by_token_ids: whether experts are looked up in a table by token id.
        remedy: advice in error messages of features that do not support the router.
        aux_loss_remedy: how to get its auxiliary loss, for the error message of `collect_aux`.
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
                f"`score` must be one of {ROUTER_SCORES}, and `returns` must contain only {ROUTER_RESULTS}, got "
                f"score={self.score!r} and returns={self.returns!r}"
            )
        if not {"logits", "probs"} & {*self.returns} or ("probs" in self.returns and self.score != "softmax"):
            raise ValueError(
                f"`returns` must contain 'logits', or 'probs' with score='softmax', got returns={self.returns!r} and "
                f"score={self.score!r}"
            )

    def check_rule(self, rule: Any, name: str) -> None:
        """Raise ValueError if a rule for the expert bias does not support the router. `name` is the router's name."""
        if rule.reads_scores:
            raise ValueError(
                f"{rule!r} reads scores, which the router {name!r} does not return; use rule='sign', or {self.remedy}"
            )


class TokenMetadata(NamedTuple):
    """What the arguments of a model reveal about the tokens of a forward."""

    mask: Tensor | None = None  # (b, n) bool, True for real tokens; None if all tokens are real
    shape: tuple[int, int] | None = None  # (b, n), or None if unknown
    mask_unknown_reason: str | None = None  # reason why the mask is unknown
    ids: Tensor | None = None  # (b, n) integer token ids; None if the model received embeddings
    segment_ids: Tensor | None = None  # (b, n) integer document ids of packed rows; None if rows are not packed


class TokensReader:
    """Extracts the tokens of a forward from the arguments of a model. The base class extracts nothing."""

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenMetadata:
        """Return the tokens of a forward with these arguments."""
        return TokenMetadata()

    def read_cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor | int]:
        """Return the cache of a forward with these arguments (None if there is none), and the number of real tokens in
        it, as `(b,)` or as one number for all sequences."""
        return None, 0

    def get_cached_keys(self, cache: Any) -> Tensor | None:
        """Return a tensor that the cache replaces when its sequences are reordered, or None if it has none."""
        return None


class Provider:
    """Describes the modules of one library. Subclasses override methods, whose defaults describe nothing."""

    gate_remedy: str | None = None  #: advice for the error raised when the gate's sizes differ from its layer's

    def find_router(self, block: nn.Module) -> ExternalRouter | None:
        """Return the router that a module calls, or None if it calls none."""
        return None

    def find_experts(self, module: nn.Module) -> nn.Module | None:
        """Return the experts of a module of this library, even if its router is unknown, or None if it has none."""
        return None

    def get_wrapped_module(self, module: nn.Module) -> nn.Module | None:
        """Return the module inside a wrapper, or None if the module is not a wrapper."""
        return None

    def list_children(self, module: nn.Module) -> list[tuple[nn.Module, bool]] | None:
        """Return the direct children of a module and whether they compute, or None if all children do."""
        return None

    def find_enclosing_model(self, modules: Sequence[nn.Module]) -> nn.Module | None:
        """Return which of several nested modules (outermost first) has arguments that describe the tokens of the
        innermost, or None if it is unknown."""
        return None

    def make_tokens_reader(self, model: nn.Module) -> TokensReader | None:
        """Return a reader of tokens for a model, possibly of another library, or None if its arguments are unknown."""
        return None

    def is_tokenwise(self, module: nn.Module) -> bool | None:
        """Return whether a module maps each row independently, using only torch operators whose result for a row does
        not depend on the batch. Its children are checked separately."""
        return None

    def is_linear(self, module: nn.Module) -> bool | None:
        """Return whether a module multiplies each token by its matrices."""
        return None

    def unsaved_reason(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
        """Return a warning if any of these named tensors, which are updated in training, will not be saved, or None if
        all of them are saved."""
        return None


#: Providers, keyed by library. Like custom operators and pickling functions, they are registered for the whole process
#: when a library is imported, and never during a forward pass.
REGISTERED_PROVIDERS: dict[str, Provider] = {}
#: providers for `BUNDLED_LIBRARIES`; `load_bundled_providers` fills this dict once
BUNDLED_PROVIDERS: dict[str, Provider] = {}


def register_provider(library: str, provider: Provider) -> None:
    """Register the provider of a library for this process, replacing the library's previous provider.

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
        raise ValueError(f"library must be the name of a top-level package, such as 'torch', got {library!r}")
    if not isinstance(provider, Provider):
        raise TypeError(f"provider must be an instance of a subclass of Provider, got {provider!r:.99}")
    REGISTERED_PROVIDERS[library] = provider


def find_providers(module: nn.Module) -> list[Provider]:
    """Return the providers of the libraries that define a module's class and its base classes, in this order."""
    found: list[Provider] = []
    for library in dict.fromkeys([kind.__module__.partition(".")[0] for kind in type(module).__mro__]):
        if library in REGISTERED_PROVIDERS:
            found.append(REGISTERED_PROVIDERS[library])
        elif library in BUNDLED_LIBRARIES and load_bundled_providers():
            found.append(BUNDLED_PROVIDERS[library])
    return found


def ask_providers(module: nn.Module, question: Callable[[Provider], AnswerT | None]) -> AnswerT | None:
    """Return the first answer of a module's providers that is not None, or None if there is no answer."""
    for provider in find_providers(module):
        if (answer := question(provider)) is not None:
            return answer
    return None


def load_bundled_providers() -> bool:
    """Import the bundled providers and return True.

    Call this function before reading `BUNDLED_PROVIDERS`, because a graph that is being traced does not see later
    changes.
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
    """Return the registered providers, and the bundled ones if a supported version of their libraries is imported."""
    if any(library in sys.modules for library in BUNDLED_LIBRARIES):
        with suppress(ImportError):
            load_bundled_providers()
    return list({**BUNDLED_PROVIDERS, **REGISTERED_PROVIDERS}.values())
