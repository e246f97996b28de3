"""Reads the padding mask and the token ids from the arguments of a `transformers` model.

Axes: b (sequences), n (tokens of the forward pass), m (tokens including those in the cache).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.providers import TokenMetadata, TokensReader
from mixture_of_experts.support.tracing import is_host_readable


def find_model_with_mask(modules: Sequence[nn.Module]) -> nn.Module | None:
    """Return the model whose arguments describe the tokens, given a list of nested modules, outermost first.

    This is the innermost `transformers` model that reads an attention mask for these tokens. If no model reads one,
    return the innermost model, or None if there are no models.
    """
    # only transformers models have `main_input_name`
    models = [module for module in reversed(modules) if hasattr(module, "main_input_name")]
    for model in models:
        if "attention_mask" in inspect.signature(model.forward).parameters:
            return model
        # for a model that reads images or audio, the masks of enclosing models describe other tokens
        if model.main_input_name != "input_ids":
            break
    return models[0] if models else None


class ArgumentsReader(TokensReader):
    """Reads the token metadata of a forward pass from the model's arguments. Positional arguments are identified by the
    parameter names of `model.forward`."""

    argument_names: ClassVar[tuple[str, ...]] = (
        "attention_mask", "input_ids", "inputs_embeds", "cache", "past_key_values",
        "position_ids", "cu_seq_lens_q", "seq_idx",
    )  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        parameters = list(inspect.signature(model.forward).parameters)
        self.positions: dict[str, int] = {
            name: parameters.index(name) for name in self.argument_names if name in parameters
        }

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenMetadata:
        return read_token_metadata(self.pick_arguments(args, kwargs))

    def pick_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Select the arguments that are listed in `argument_names`, and return them keyed by name."""
        arguments = {name: args[place] for name, place in self.positions.items() if place < len(args)}
        return arguments | {name: kwargs[name] for name in self.argument_names if name in kwargs}

    def read_cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor | int | None]:
        arguments = self.pick_arguments(args, kwargs)
        return get_cache(arguments), count_seen_tokens(arguments)

    def get_cached_length(self, cache: Any) -> int:
        return count_cached_tokens({"cache": cache})

    def get_cached_keys(self, cache: Any) -> Tensor | None:
        """Return the keys in the first cache layer that contains keys, or None if no layer contains any."""
        cache = getattr(cache, "self_attention_cache", cache)
        found = (getattr(layer, "keys", None) for layer in getattr(cache, "layers", ()))
        return next((keys for keys in found if isinstance(keys, Tensor)), None)


def read_token_metadata(arguments: Mapping[str, Any]) -> TokenMetadata:
    """Return the token metadata that a model's arguments describe."""
    tokens, embeds, mask = arguments.get("input_ids"), arguments.get("inputs_embeds"), get_attention_mask(arguments)
    shape = () if embeds is None else embeds.shape[:-1]
    shape = shape if tokens is None else tokens.shape
    if len(shape) != 2:
        return TokenMetadata()
    b, n = shape
    metadata = TokenMetadata(shape=(b, n), ids=tokens)
    if mask is None:
        documents = find_documents(arguments, (b, n))
        return metadata._replace(segment_ids=documents, mask=find_real_tokens(documents, tokens))
    if mask.ndim == 2 and mask.shape[0] == b and mask.shape[1] >= n:
        token_mask = mask[:, -n:].bool()
        # in a decoding step of `generate`, all tokens are real
        is_decoding_step = n == 1 and is_host_readable(token_mask) and bool(token_mask.all())
        return metadata if is_decoding_step else metadata._replace(mask=token_mask)
    if mask.ndim in (3, 4) and mask.shape[0] == b and mask.shape[-2] == n:
        return metadata._replace(mask=mask_from_diagonal(mask, arguments))
    return metadata._replace(
        mask_unknown_reason=f"the attention mask has shape {tuple(mask.shape)}, but there are ({b}, {n}) tokens"
    )


def find_documents(arguments: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Return the document id of each token in packed rows, as an integer tensor `(b, n)`.

    Documents are identified in the same way as in `transformers` attention: from `seq_idx`, from the cumulative lengths
    of a single row, or from positions that do not increase by one. Return None if there is a mask or a cache, or if the
    values can be read on the host and show that the rows are not packed.
    """
    b, n = shape
    if arguments.get("attention_mask") is not None or get_cache(arguments) is not None:
        return None
    lengths, positions = arguments.get("cu_seq_lens_q"), arguments.get("position_ids")
    documents = arguments.get("seq_idx")
    if positions is not None and positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]  # text positions; the other three rows are image and video coordinates
    if documents is None and lengths is not None and b == 1:
        documents = torch.searchsorted(lengths, torch.arange(n, device=lengths.device), right=True).unsqueeze(0)
    elif documents is None and positions is not None and positions.ndim == 2:
        starts = positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1
        documents = starts.cumsum(dim=-1)
    if documents is None or documents.ndim != 2 or documents.shape[1] != n or documents.shape[0] not in (1, b):
        return None
    # distributed runs skip this check, because all ranks must agree on whether rows are packed
    if not is_distributed() and is_host_readable(documents) and bool((documents == documents[:, :1]).all()):
        return None
    return documents.expand(b, n)


def find_real_tokens(documents: Tensor | None, ids: Tensor | None) -> Tensor | None:
    """Return a bool mask `(b, n)` of the tokens that are not padding, given the document id and the token id of each
    token in packed rows, both `(b, n)`. Return None if the rows are not packed or have no padding.

    A collator that pads packed rows, such as TRL's with `pad_to_multiple_of`, makes each padding token a document.
    Therefore, two or more equal tokens at the end of a row are padding if each of them is a document.
    """
    if documents is None or ids is None:
        return None
    starts = F.pad(documents.diff(dim=-1) != 0, (1, 1), value=True)
    is_padding = starts[:, :-1] & starts[:, 1:] & (ids == ids[:, -1:])
    is_padding = (~is_padding).flip(-1).cumsum(dim=-1).flip(-1) == 0  # after the last other token
    real = ~is_padding | (is_padding.sum(dim=-1, keepdim=True) < 2)
    return None if not is_distributed() and is_host_readable(real) and bool(real.all()) else real


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def get_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache that was passed to a model, or None if no cache was passed."""
    return arguments.get("cache", arguments.get("past_key_values"))


def count_cached_tokens(arguments: Mapping[str, Any]) -> int:
    """Return the number of tokens in the cache, including padding."""
    cache = get_cache(arguments)
    return 0 if cache is None else int(cache.get_seq_length())


def count_seen_tokens(arguments: Mapping[str, Any]) -> Tensor | int | None:
    """Return the number of cached tokens that are not padding, as a tensor `(b,)` or as a single number for all
    sequences. Return None if the attention mask includes only the last cached tokens."""
    mask, cached = get_attention_mask(arguments), count_cached_tokens(arguments)
    if mask is None or not cached:
        return cached
    if mask.ndim == 2:
        return mask[:, :cached].bool().sum(dim=-1)
    if count_missing_keys(mask, cached):
        return None
    # use the mask row that belongs to the first new token
    return to_bool_mask(select_first_head(mask)[:, 0, :cached]).sum(dim=-1)


def count_missing_keys(mask: Tensor, cached: int) -> int:
    """Return the number of earliest tokens that an attention mask `(b, n, m)` or `(b, heads, n, m)` omits because they
    are outside the sliding window of all layers."""
    return max(cached + mask.shape[-2] - mask.shape[-1], 0)


def get_attention_mask(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the attention mask that was passed to a model. If a dictionary of masks was passed, return the mask for
    full attention, or the only mask if there is just one."""
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Mapping):
        return mask
    return mask.get("full_attention", next(iter(mask.values())) if len(mask) == 1 else None)


def select_first_head(mask: Tensor) -> Tensor:
    """Return the first head's mask `(b, n, m)`, given a mask `(b, n, m)` or `(b, heads, n, m)`."""
    return mask[:, 0] if mask.ndim == 4 else mask


def to_bool_mask(mask: Tensor) -> Tensor:
    """Convert an attention mask to a bool mask that is True where attention is allowed."""
    return mask if mask.dtype == torch.bool else mask >= 0 if mask.is_floating_point() else mask > 0


def mask_from_diagonal(mask: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return a bool mask `(b, n)` of the tokens that are not padding, given an attention mask `(b, n, m)` or
    `(b, heads, n, m)`.

    The mask is read from the diagonal, because padding does not attend to itself. Return None for a single token,
    because a decoded token is never padding.
    """
    n = mask.shape[-2]
    if n == 1:
        return None
    cached = count_cached_tokens(arguments)
    first = cached - count_missing_keys(mask, cached)
    token_rows = select_first_head(mask)[..., first : first + n]
    return to_bool_mask(token_rows.diagonal(dim1=-2, dim2=-1))
