"""Uses providers to determine which tokens in a model's forward pass are real, and which sequences they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mixture_of_experts.providers import TokenMetadata, TokensReader, find_providers, list_providers
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, ForwardWatch


def find_enclosing_model(modules: Sequence[nn.Module]) -> nn.Module:
    """Return the model whose arguments describe the tokens. `modules` are nested, with the outermost module first. If
    no provider can identify this model, the outermost module is returned."""
    for provider in dict.fromkeys(each for module in modules for each in find_providers(module)):
        if (model := provider.find_enclosing_model(modules)) is not None:
            return model
    return modules[0]


def make_tokens_reader(model: nn.Module) -> TokensReader:
    """Return a reader for a model's tokens. The reader comes from the provider for the model's library, or else from
    any provider that recognizes the model's arguments."""
    for provider in dict.fromkeys((*find_providers(model), *list_providers())):
        if (reader := provider.make_tokens_reader(model)) is not None:
            return reader
    return TokensReader()


@dataclass(eq=False)
class TokenCall(ForwardCall):
    """An ongoing forward pass of a model that contains routers or experts."""

    tokens: TokenMetadata


class TokenWatch(ForwardWatch):
    """Provides the token metadata of the ongoing forward pass of `model`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.reader: TokensReader = make_tokens_reader(model)

    def make_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenCall:
        return TokenCall(self.reader(args, kwargs))

    def current_tokens(self) -> TokenMetadata:
        """Return the token metadata of the ongoing forward pass. If no forward pass is running, all fields are
        unknown."""
        call = call_stack.current_call(self)
        return TokenMetadata() if call is None else call.tokens
