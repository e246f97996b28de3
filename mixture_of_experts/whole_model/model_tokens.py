"""The tokens of a model's running forward pass, as read by providers: which are real, and in which sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mixture_of_experts.providers import TokenMetadata, TokensReader, find_providers, list_providers
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, ForwardWatch


def find_enclosing_model(modules: Sequence[nn.Module]) -> nn.Module:
    """Return the model whose arguments describe the tokens, given nested modules, outermost first. It is the one that a
    provider of these modules knows, or else the outermost module."""
    for provider in dict.fromkeys(each for module in modules for each in find_providers(module)):
        if (model := provider.find_enclosing_model(modules)) is not None:
            return model
    return modules[0]


def make_tokens_reader(model: nn.Module) -> TokensReader:
    """Return a reader of the tokens of a model, from the provider of its library, or else from any other provider that
    knows its arguments."""
    for provider in dict.fromkeys((*find_providers(model), *list_providers())):
        if (reader := provider.make_tokens_reader(model)) is not None:
            return reader
    return TokensReader()


@dataclass(eq=False)
class TokenCall(ForwardCall):
    """A running forward pass of a model that contains routers or experts."""

    tokens: TokenMetadata


class TokenWatch(ForwardWatch):
    """A watch that provides the tokens of the running forward pass of `model`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.reader: TokensReader = make_tokens_reader(model)

    def make_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenCall:
        return TokenCall(self.reader(args, kwargs))

    def current_tokens(self) -> TokenMetadata:
        """Return the tokens of the running forward pass. All fields are unknown if there is none."""
        call = call_stack.current_call(self)
        return TokenMetadata() if call is None else call.tokens
