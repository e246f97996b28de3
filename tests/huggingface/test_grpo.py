"""TRL's GRPO with `ReplayRouting`: it trains with the experts that its own generation chose."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support.transformers_models import VOCABULARY
from support.transformers_trainers import dataset, settings, texts, tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mixture_of_experts.huggingface import ReplayRouting, upcycle

pytestmark = [
    # peft and trl use names that transformers deprecates
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]


def llama() -> Any:
    """Experts differ, so that another choice is another output."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.25, **sizes, **tokens))
    upcycle(model, num_experts=16, redraw=1.0, loss_coef=0.0)
    return model


def measured() -> Any:
    """A trainer that keeps the largest differences of log-probabilities in each training forward: to those that it
    sampled with, and to the old ones that it divides by."""
    from trl import GRPOTrainer
    from trl.trainer.utils import pad

    class Measured(GRPOTrainer):
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
                self.found.append([float((logps - o)[there].abs().max()) for o in (self.inputs["sampled"], old)])
            return found

    return Measured


def train(folder: Path, *mixins: type, weights: bool = False, peft: Any = None, **more: Any) -> list[list[float]]:
    from trl import GRPOConfig

    found: list[list[float]] = []
    Trainer = type("Trainer", (*mixins, measured()), dict(found=found, replay_weights=weights))
    common = {**settings(2, folder), "per_device_train_batch_size": 4, "max_steps": 2}
    config = GRPOConfig(**{**common, **dict(num_generations=4, max_completion_length=12, bf16=True), **more})
    data = dataset([{"prompt": text} for text in texts(True)])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    torch.manual_seed(1)
    trainer: Any = Trainer(
        llama(), reward, args=config, train_dataset=data, processing_class=tokenizer(), peft_config=peft
    )
    trainer.train()
    return found


@pytest.mark.slow
def test_it_trains_with_the_experts_that_it_sampled_with(tmp_path):
    """It samples in float32, prompts padded on the left, and trains in bfloat16, both sides padded, with activation
    checkpointing. Mini-batches are shuffled; two of them make a step, and two steps take each generation. Old
    log-probabilities are those of the first step, to the bit; after it routers differ, choices do not."""
    more: Any = dict(num_iterations=2, learning_rate=1e-3)
    (*first, third, last), free = train(tmp_path, ReplayRouting, **more), train(tmp_path, **more)
    # differences to what was sampled and to the old ones: the table of docs/replay.md
    print("replayed", *first, third, last, "as it is", *free, sep="\n")
    assert [old for _, old in first] == [0.0, 0.0]
    assert max(sampled for sampled, _ in first) < 0.05 < 0.3 < max(sampled for sampled, _ in free[:2])
    assert max(third[1], last[1]) < 0.4 < 1.5 < max(free[2][1], free[3][1])


@pytest.mark.slow
def test_adapters_a_reference_weights_and_chunks(tmp_path):
    """The adapter's model is its own reference, which is computed in two chunks of the generation."""
    from peft import LoraConfig

    lora = LoraConfig(target_modules=["q_proj"], r=2)
    found = train(tmp_path, ReplayRouting, weights=True, peft=lora, beta=0.1)
    assert max(sampled for sampled, _ in found) < 0.2


@pytest.mark.slow
def test_other_generations_are_refused(tmp_path):
    from trl import GRPOTrainer

    class Other(ReplayRouting, GRPOTrainer):
        rollout_func = None

        def __init__(self, **attributes: Any) -> None:
            self.__dict__.update(attributes)
            super().__init__()

    with pytest.raises(TypeError, match="write class Trainer"):
        type("Alone", (ReplayRouting,), {})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "__init__", lambda self: None)
        with pytest.raises(ValueError, match="the trainer's own generation, which use_vllm replaces"):
            Other(use_vllm=True)
        with pytest.raises(ValueError, match="has no gate"):
            Other(model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"8 prompts were recorded as .* sequences: generate with a cache"):
        train(tmp_path, ReplayRouting, generation_kwargs=dict(use_cache=False))
