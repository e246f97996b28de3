"""Adds router settings to the configuration of a modified model, for trainers that request the auxiliary loss of MoE
models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

#: configuration entry that stores the initial auxiliary-loss coefficient of the first layer, or of the blocks that
#: became layers. A trainer may set `router_aux_loss_coef`. The loss is multiplied by the ratio of that setting to the
#: initial coefficient (1 if there was none). Saved files contain both entries
INITIAL_COEF_KEY = "router_aux_loss_coef_at_first"
#: settings that `add_router_config` adds to a configuration
ROUTER_KEYS = ("output_router_logits", "router_aux_loss_coef", INITIAL_COEF_KEY, "num_experts", "num_experts_per_tok")


def add_router_config(model: nn.Module, moe: Any) -> None:
    """Make TRL's trainers request the auxiliary loss of a model that contains `MoE` layers. The model's watch then
    returns the loss as `out.aux_loss`.

    These trainers compute losses from log-probabilities and ignore the model's own loss. The trainers request the
    auxiliary loss if the model's configuration contains router settings. The settings are taken from `moe`.
    """
    config = find_text_config(model)
    if config is None or has_own_routers(config) or getattr(model, "base_model", model) is model:
        return
    values = (True, moe.loss_coef or 1.0, moe.loss_coef, moe.num_experts, getattr(moe.gate, "k", 1))
    for name, value in zip(ROUTER_KEYS, values, strict=True):
        if not hasattr(config, name):
            setattr(config, name, value)


def override_router_coef(model: nn.Module) -> None:
    """Replace a model's own auxiliary loss with the losses of its layers, because the model's own routers were
    removed."""
    config = find_text_config(model)
    if config is not None and has_own_routers(config) and get_unit_aux_loss_coef(config) is None:
        setattr(config, INITIAL_COEF_KEY, getattr(config, "router_aux_loss_coef", None))
        config.router_aux_loss_coef = get_unit_aux_loss_coef(config)


def restore_router_config(model: nn.Module) -> None:
    """Undo `add_router_config` and `override_router_coef`."""
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
    """Return the part of a model's configuration that contains the router settings, or None if the model has no
    configuration."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def has_own_routers(config: Any) -> bool:
    """Return whether stock models with this configuration class have their own routers."""
    return hasattr(type(config), "output_router_logits")


def requests_router_logits(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Return whether an argument or the configuration requests router logits from a forward pass. The result is False
    if the layers' losses replace the model's own auxiliary loss, because router logits are not available in that
    case."""
    asked = kwargs.get("output_router_logits")
    if asked is not None and not asked:
        return False
    config = find_text_config(model)
    asked = getattr(config, "output_router_logits", False) if asked is None else asked
    return bool(asked) and get_unit_aux_loss_coef(config) is None


def get_aux_loss_factor(config: Any) -> float:
    """Return the factor by which the auxiliary loss is multiplied. The factor is 1 unless `router_aux_loss_coef` was
    changed, for example by a trainer."""
    unit = get_unit_aux_loss_coef(config)
    return 1.0 if unit is None else (config.router_aux_loss_coef or 0.0) / unit


def get_unit_aux_loss_coef(config: Any) -> float | None:
    """Return the value of `router_aux_loss_coef` that corresponds to a factor of 1, or None if this setting does not
    affect the layers."""
    return (getattr(config, INITIAL_COEF_KEY) or 1.0) if hasattr(config, INITIAL_COEF_KEY) else None
