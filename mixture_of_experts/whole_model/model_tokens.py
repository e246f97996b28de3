"""The tokens of the running forward of a model: which are real, and in which sequences, as providers read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mixture_of_experts.providers import TokenMetadata, TokensReader, find_providers, list_providers
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, ForwardWatch


def find_enclosing_model(modules: Sequence[nn.Module]) -> nn.Module:
    """The model whose arguments describe the tokens, from nested modules, outermost first: the one that a provider of
    these modules knows, else the outermost module."""
    for provider in dict.fromkeys(each for module in modules for each in find_providers(module)):
        if (model := provider.find_enclosing_model(modules)) is not None:
            return model
    return modules[0]


def make_tokens_reader(model: nn.Module) -> TokensReader:
    """A reader of the tokens of a model, by the provider of its library, or else by any other that knows its
    arguments."""
    for provider in dict.fromkeys((*find_providers(model), *list_providers())):
        if (reader := provider.make_tokens_reader(model)) is not None:
            return reader
    return TokensReader()


@dataclass(eq=False)
class TokenCall(ForwardCall):
    """A running forward of a model that contains routers or experts."""

    tokens: TokenMetadata


class TokenWatch(ForwardWatch):
    """Provides the tokens of the running forward of `model`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.reader: TokensReader = make_tokens_reader(model)

    def make_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenCall:
        return TokenCall(self.reader(args, kwargs))

    def current_tokens(self) -> TokenMetadata:
        """The tokens of the running forward; all fields are unknown if there is none."""
        call = call_stack.current_call(self)
        return TokenMetadata() if call is None else call.tokens
