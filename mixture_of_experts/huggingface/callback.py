"""`Trainer` callbacks that log routing statistics and update expert biases."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, suppress
from statistics import fmean
from typing import Any

from transformers import Trainer, TrainerCallback

from mixture_of_experts.gating.bias_rules import BiasRule, RuleName
from mixture_of_experts.stats import Record, RoutingStats, track_routing
from mixture_of_experts.whole_model.balancing import ExpertBalancing, balance_experts, ignore_counts_in_ddp


class RoutingCallback(TrainerCallback):
    """A callback that adds routing statistics to the Trainer's logs. The statistics cover all micro-batches of the last
    optimizer step in which at least one gate ran. Forward passes without gradients, such as sampling, are ignored.

    `routing/balance` (the load-balancing loss; 1 means balanced for `TopKGating` and routers of `transformers`),
    `routing/entropy` (in nats) and `routing/dropped` (the fraction of dropped choices) are averaged over layers.
    `routing/max_load` is the highest expert load in any layer (1 means balanced), and `routing/dead_experts` is the
    total number of dead experts. Layers whose gates did not run in this step are ignored. The callback supports models
    with `MoE` layers as well as `transformers` MoE models.

    Use `log_routing` to add this callback to a Trainer. If this callback were passed to the Trainer's constructor, it
    would run after the reporting callbacks, and the statistics would appear only in `log_history`.

    Args:
        layers: whether to also log the statistics of each layer, as `routing/<gate>/<name>`.
    """

    def __init__(self, layers: bool = False) -> None:
        self.layers = layers
        self.stats: RoutingStats | None = None
        self._hooks = ExitStack()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._hooks.close()
        self.stats = self._hooks.enter_context(track_routing(kwargs["model"], keep=1024, when="training"))
        self.stats._counter.requires_grad = True

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.stats is not None:
            with suppress(RuntimeError):  # if nothing was recorded, `on_log` warns
                self.stats.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.stats is None or logs is None or "loss" not in logs:  # this is not a training log
            return
        try:
            latest = self.stats.latest()
        except RuntimeError as error:  # training continues without the statistics
            warnings.warn(f"routing statistics are no longer logged: {error}", stacklevel=2)
            self.on_train_end()
            self.stats = None
            return
        records = [record for record in latest if record.step == max(other.step for other in latest)]
        values = summarize_records(records)
        if self.layers:
            for record in records:
                values |= {f"routing/{record.layer}/{name}": value for name, value in record.scalars().items()}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._hooks.close()


def log_routing(trainer: Trainer, layers: bool = False) -> RoutingCallback:
    """Log routing statistics to all of a Trainer's reporting integrations. Call this function before `trainer.train()`.

    Args:
        layers: whether to also log the statistics of each layer.

    Returns:
        The callback, whose `stats` attribute can be read and plotted during and after training.
    """
    callback = RoutingCallback(layers)
    trainer.callback_handler.callbacks.insert(0, callback)  # the callback must precede the reporting callbacks
    return callback


def summarize_records(records: list[Record]) -> dict[str, float]:
    """Combine the layers' statistics into one value for each metric."""
    return {
        "routing/balance": fmean(record.losses.get("balance", 0.0) for record in records),
        "routing/entropy": fmean(record.entropy for record in records),
        "routing/dropped": fmean(record.dropped for record in records),
        "routing/max_load": max(float(record.relative_load.max()) for record in records),
        "routing/dead_experts": float(sum(len(record.dead) for record in records)),
    }


class BalanceCallback(TrainerCallback):
    """A callback that uses `balance_experts` to update the expert bias of every gate after each optimizer step.

    Pass it to the Trainer: `Trainer(..., callbacks=[BalanceCallback()])`.

    Args:
        rule, rate: see `balance_experts`.
    """

    def __init__(self, rule: RuleName | BiasRule = "sign", rate: float | None = None) -> None:
        self.rule: RuleName | BiasRule = rule
        self.rate = rate
        self.balancing: ExpertBalancing | None = None

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        ignore_counts_in_ddp(kwargs["model"])  # call this before DDP wraps the model

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.on_train_end()
        self.balancing = balance_experts(kwargs["model"], kwargs["optimizer"], self.rule, self.rate)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self.balancing is not None:
            self.balancing.close()
