"""Routers that pass a state from one layer to the next (exponential depth averaging).

Axes: b (groups), n (tokens per group), d (model dimension), r (width of the state), e (experts).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from mixture_of_experts.gating.base import Tokens
from mixture_of_experts.gating.choices import Choices
from mixture_of_experts.gating.logits import call_in_dtype
from mixture_of_experts.gating.overrides import STATE
from mixture_of_experts.gating.topk import TopKGating
from mixture_of_experts.support.checks import check_flag, check_size, describe_shape
from mixture_of_experts.support.tracing import disable_autocast


class DepthAveragedGating(TopKGating):
    """A router that computes its logits from a state accumulated over layers, as in ZAYA1 and ZONOS2.

    The previous layer's router state is added to the state of this layer (arXiv 2605.05365, section II-A, equations 1
    to 3; introduced in arXiv 2511.17127). If `router_state` is passed (None in the first layer), the layer also returns
    the state for the next layer::

        out, aux_loss, state = moe(x, router_state=state)

    Args:
        dim, num_experts, k: model dimension d, number of experts e, and number of choices per token.
        state_dim: width of the state, r.
        first: whether this is the first layer, which receives no state. All other layers require a state.
        logits: a module that maps states `(..., b, n, r)` to logits `(..., b, n, e)`. Default: a normalization layer
            followed by three linear layers with GELU activations in between, as in ZAYA1.
        settings: other arguments of `TopKGating`, except `outer_expert_dims`.

    Shape:
        The gate maps `x` `(b, n, d)` and, except in the first layer, `router_state` `(b, n, r)` to a `Routing`. The
        routing's `state` `(b, n, r)` is `down(x) + state_scale * router_state`, computed in float32 (float64 for
        float64 weights). `down` is a linear layer from d to r, and `state_scale` has the shape `(r,)`.

    Raises:
        TypeError, ValueError: if the state is missing or has the wrong shape or dtype, or if the first layer receives a
            state.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> layers = [MoE(dim=8, gate=DepthAveragedGating(8, 4, state_dim=6, first=i == 0)) for i in range(3)]
        >>> x, state = torch.randn(2, 16, 8), None
        >>> for moe in layers:
        ...     out, aux_loss, state = moe(x, router_state=state)
        ...     x = x + out
        >>> state.shape
        torch.Size([2, 16, 6])
    """

    state_dim: int
    first: bool
    state_scale: nn.Parameter | None

    side_inputs: ClassVar[tuple[str, ...]] = (*TopKGating.side_inputs, STATE)
    shape_attributes: ClassVar[tuple[str, ...]] = (*TopKGating.shape_attributes, "state_dim", "first")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        state_dim: int = 256,
        first: bool = True,
        logits: nn.Module | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        factory: Any = dict(device=device, dtype=dtype)
        r = check_size("state_dim", state_dim)
        if logits is None:
            logits = nn.Sequential(
                nn.RMSNorm(r, eps=1e-5, **factory),
                *(nn.Linear(r, r, **factory), nn.GELU()),
                *(nn.Linear(r, r, **factory), nn.GELU()),
                nn.Linear(r, num_experts, bias=False, **factory),
            )
        super().__init__(dim, num_experts, k, logits=logits, **factory, **settings)
        if self.outer_expert_dims:
            raise ValueError(f"{type(self).__name__} does not support outer_expert_dims or a second level")
        self.state_dim, self.first = r, check_flag("first", first)
        self.down: nn.Linear = nn.Linear(dim, r, **factory)
        self.state_scale = None if self.first else nn.Parameter(torch.ones(r, **factory))

    def reset_parameters(self) -> None:
        """Set the scale to 1, and all biases and counts to 0. This method does not reset the modules `down` and
        `logits`."""
        super().reset_parameters()
        if (scale := self._parameters.get("state_scale")) is not None:
            nn.init.ones_(scale)

    def variant_reason(self) -> str:
        return f"{type(self).__name__} computes its logits with linear layers; use TopKGating"

    def decide(self, tokens: Tokens) -> Choices:
        """Choose experts based on the state, and return the choices and the state."""
        dtype = torch.float64 if self.down.weight.dtype == torch.float64 else torch.float32
        with disable_autocast(tokens.x.device):
            state = call_in_dtype(self.down, tokens.x, dtype)
            if self.state_scale is not None:
                before = tokens.side[STATE]
                if before.shape != state.shape:
                    raise ValueError(f"{STATE} must have shape {tuple(state.shape)}, got {describe_shape(before)}")
                if not before.is_floating_point():
                    raise TypeError(
                        f"{STATE} must be floating point, got {before.dtype}; pass the state that the previous layer "
                        "returned"
                    )
                state = state + before * self.state_scale.to(dtype)
            elif STATE in tokens.side:
                raise ValueError(
                    f"{STATE} must be None in the first layer; construct the gates of later layers with first=False"
                )
        return super().decide(replace(tokens, x=state))._replace(state=state)
