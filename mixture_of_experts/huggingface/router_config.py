"""What the configuration of a changed model says of routers, to trainers that ask models with routers for a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

#: setting with the coefficient that the first layer had when it came, or the blocks that became layers. Relative to it,
#: or to 1 if there was none, `router_aux_loss_coef` is the factor of the loss, which a trainer may set: a file has both
INITIAL_COEF_KEY = "router_aux_loss_coef_at_first"
#: settings that `announce` adds to a configuration
ROUTER_KEYS = ("output_router_logits", "router_aux_loss_coef", INITIAL_COEF_KEY, "num_experts", "num_experts_per_tok")


def add_router_config(model: nn.Module, moe: Any) -> None:
    """Make the trainers of TRL ask a model with layers such as `moe` for the auxiliary loss, which its watch gives them
    as `out.aux_loss`.

    They compute losses from log-probabilities and ignore the model's own loss. They ask a model for the auxiliary loss
    if its configuration says that it has routers.
    """
    config = find_text_config(model)
    if config is None or has_own_routers(config) or getattr(model, "base_model", model) is model:
        return
    values = (True, moe.loss_coef or 1.0, moe.loss_coef, moe.num_experts, getattr(moe.gate, "k", 1))
    for name, value in zip(ROUTER_KEYS, values, strict=True):
        if not hasattr(config, name):
            setattr(config, name, value)


def override_router_coef(model: nn.Module) -> None:
    """Let the losses of a model's layers stand for its own, whose routers are gone."""
    config = find_text_config(model)
    if config is not None and has_own_routers(config) and get_unit_aux_loss_coef(config) is None:
        setattr(config, INITIAL_COEF_KEY, getattr(config, "router_aux_loss_coef", None))
        config.router_aux_loss_coef = get_unit_aux_loss_coef(config)


def restore_router_config(model: nn.Module) -> None:
    """Undo `announce` and `override_router_coef`."""
    config = find_text_config(model)
    if config is None or INITIAL_COEF_KEY not in vars(config):
        return
    first, plain = vars(config).pop(INITIAL_COEF_KEY), type(config)()
    for name in ROUTER_KEYS:
        if not hasattr(plain, name):
            vars(config).pop(name, None)
    if has_own_routers(config):
        vars(config).pop("router_aux_loss_coef", None)
        vars(config).update({} if first is None else {"router_aux_loss_coef": first})


def find_text_config(model: nn.Module) -> Any:
    """The part of a model's configuration in which routers are; None if it has no configuration."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def has_own_routers(config: Any) -> bool:
    """Whether models of this configuration have routers of their own."""
    return hasattr(type(config), "output_router_logits")


def requests_router_logits(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward is to return router logits, by an argument or the configuration. Where the losses of the layers
    stand for the model's own, there are none."""
    asked = kwargs.get("output_router_logits")
    if asked is not None and not asked:
        return False
    config = find_text_config(model)
    asked = getattr(config, "output_router_logits", False) if asked is None else asked
    return bool(asked) and get_unit_aux_loss_coef(config) is None


def get_aux_loss_factor(config: Any) -> float:
    """The factor of the auxiliary loss: 1, or what follows from the `router_aux_loss_coef` that a trainer set."""
    unit = get_unit_aux_loss_coef(config)
    return 1.0 if unit is None else (config.router_aux_loss_coef or 0.0) / unit


def get_unit_aux_loss_coef(config: Any) -> float | None:
    """The `router_aux_loss_coef` that is a factor of 1; None if layers and the setting have nothing to do with each
    other."""
    return (getattr(config, INITIAL_COEF_KEY) or 1.0) if hasattr(config, INITIAL_COEF_KEY) else None
