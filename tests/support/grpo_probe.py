"""TRL's GRPO trainer, that keeps how far its log-probabilities are from those that it sampled with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_measured_trainer() -> Any:
    """A trainer that keeps the differences of log-probabilities `(tokens,)` in each training forward, in `found`: to
    those that it sampled with, and to the old ones that it divides by."""
    from trl import GRPOTrainer
    from trl.trainer.utils import pad

    class Measured(GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.found: list[list[Tensor]] = []
            super().__init__(*args, **kwargs)

        def _generate_single_turn(self, *args: Any) -> Any:
            logits: list[Tensor] = []
            model: Any = self.model
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            hook = model.register_forward_hook(lambda _, args, out: logits.append(out.logits[:, -1].float()))
            ids, rest = super()._generate_single_turn(*args)
            hook.remove()
            logps = torch.stack(logits, dim=1).log_softmax(-1)
            self.sampled = pad([logps[i, range(len(row)), row] for i, row in enumerate(ids)], 0.0, "right")
            return ids, rest

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            return {**super()._generate_and_score_completions(inputs), "sampled": self.sampled}

        def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
            self.inputs = inputs
            return super()._compute_loss(model, inputs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if torch.is_grad_enabled():
                there, logps = self.inputs["completion_mask"].bool(), found[0].detach()
                old = self.inputs.get("old_per_token_logps", logps)
                self.found.append([(logps - o)[there] for o in (self.inputs["sampled"], old)])
            return found

    return Measured
