"""What `huggingface/grpo.py`, the one file that knows TRL's private names, relies on in its `GRPOTrainer`."""

from __future__ import annotations

import inspect

import pytest
import torch

from mixture_of_experts.huggingface import grpo

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

#: the arguments that are handed on by position, and by name
ARGUMENTS = {
    "_generate_single_turn": ["self", "prompt_ids"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "model", "inputs"],
    "_get_per_token_logps_and_entropies": [
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size")
    ],
}


@pytest.mark.parametrize("method", grpo.TRAINER_METHODS)
def test_methods_that_replay_extends(method: str):
    arguments = list(inspect.signature(getattr(trl.GRPOTrainer, method)).parameters)
    assert arguments[: len(ARGUMENTS[method])] == ARGUMENTS[method]


def test_a_training_step_computes_one_loss():
    """`training_step` calls `_compute_loss`, and that asks for the log-probabilities."""
    assert "training_step" in dir(trl.GRPOTrainer)
    assert "self._get_per_token_logps_and_entropies(" in inspect.getsource(trl.GRPOTrainer._compute_loss)
    assert "self._generate_single_turn(" in inspect.getsource(trl.GRPOTrainer)


def test_lists_are_shuffled_and_split_with_tensors():
    from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

    batch = {"numbers": torch.arange(4), "routing": [0, 1, 2, 3]}
    mixed = shuffle_sequence_dict(batch)
    assert mixed["numbers"].tolist() == mixed["routing"]
    assert [part["routing"] for part in split_tensor_dict(batch, 2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("name", [*grpo.GENERATION_ENGINE_FLAGS, "rollout_func", "tools"])
def test_trainer_has_generation_attributes(name: str):
    assert f"self.{name} = " in inspect.getsource(trl.GRPOTrainer.__init__)
