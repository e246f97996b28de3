"""TRL's GRPO with `ReplayRouting`: it trains with the experts that its own generation chose."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.grpo_probe import make_measured_trainer
from support.transformers_models import VOCABULARY
from support.transformers_trainers import make_dataset, make_settings, make_texts, make_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mixture_of_experts.huggingface import ReplayRouting, fast_lora, upcycle
from mixture_of_experts.replay import RoutingRecords, record_routing, replay_routing

pytestmark = [
    # peft and trl use names that transformers deprecates
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:the routers in .* were initialized in memory:UserWarning"
    ),  # see test_adapter_checkpoints.py
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]


def make_llama() -> Any:
    """Experts differ, so that another choice is another output."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.25, **sizes, **tokens))
    upcycle(model, num_experts=16, redraw=1.0, loss_coef=0.0)
    return model


def run_training(
    folder: Path, *mixins: type, weights: bool = False, peft: Any = None, rollout: Any = None, **more: Any
) -> list[list[float]]:
    from trl import GRPOConfig

    Trainer = type("Trainer", (*mixins, make_measured_trainer()), dict(replay_weights=weights))
    common = {**make_settings(2, folder), "per_device_train_batch_size": 4, "max_steps": 2}
    config = GRPOConfig(**{**common, **dict(num_generations=4, max_completion_length=12, bf16=True), **more})
    data = make_dataset([{"prompt": text} for text in make_texts(True)])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    torch.manual_seed(1)
    given = dict(
        args=config, train_dataset=data, processing_class=make_tokenizer(), peft_config=peft, rollout_func=rollout
    )
    trainer: Any = Trainer(make_llama(), reward, **given)
    if peft is not None:
        fast_lora(trainer.model)
    trainer.train()
    return [[float(difference.abs().max()) for difference in pair] for pair in trainer.found]


@pytest.mark.slow
def test_it_trains_with_the_experts_that_it_sampled_with(tmp_path):
    """It samples in float32, prompts padded on the left, and trains in bfloat16, both sides padded, with activation
    checkpointing. Mini-batches are shuffled; two of them make a step, and two steps take each generation. Old
    log-probabilities are those of the first step, to the bit; after it routers differ, choices do not."""
    more: Any = dict(num_iterations=2, learning_rate=1e-3)
    (*first, third, last), free = run_training(tmp_path, ReplayRouting, **more), run_training(tmp_path, **more)
    # differences to what was sampled and to the old ones: the figures of docs/replay.md
    print("replayed", *first, third, last, "as it is", *free, sep="\n")
    assert [old for _, old in first] == [0.0, 0.0]
    assert max(sampled for sampled, _ in first) < 0.05 < 0.3 < max(sampled for sampled, _ in free[:2])
    assert max(third[1], last[1]) < 0.4 < 1.5 < max(free[2][1], free[3][1])


@pytest.mark.slow
def test_adapters_a_reference_weights_and_chunks(tmp_path):
    """The adapter's model is its own reference, which is computed in two chunks of the generation."""
    from peft import LoraConfig

    experts = ["experts.w1", "experts.w3", "experts.w2"]
    lora = LoraConfig(target_modules=["q_proj"], target_parameters=experts, r=2)
    found = run_training(tmp_path, ReplayRouting, weights=True, peft=lora, beta=0.1)
    assert max(sampled for sampled, _ in found) < 0.2


def make_engine() -> Any:
    """Stands for vLLM: a rollout function that generates with a model of its own, whose routers are others."""
    from trl.trainer.utils import pad

    model = make_llama().eval()
    for name, weight in model.named_parameters():
        if name.endswith("w_gating"):
            torch.nn.init.normal_(weight, std=0.25)

    def roll_out(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [make_tokenizer()(text)["input_ids"] for text in prompts]
        output, weights = dict(prompt_ids=ids, completion_ids=[], logprobs=[], routed_experts=[]), []
        for row in ids:
            with torch.no_grad(), record_routing(model, weights=True) as records:
                tokens = model.generate(torch.tensor([row]), max_new_tokens=12, do_sample=True)
                logps = model(tokens).logits[0].log_softmax(-1)[len(row) - 1 : -1]
            arrays = [torch.stack([of[0] for of in kept.values()], 1) for kept in (records, records.weights)]
            output["completion_ids"].append(tokens[0, len(row) :].tolist())
            output["logprobs"].append(logps.gather(-1, tokens[0, len(row) :, None]).squeeze(-1).tolist())
            output["routed_experts"].append(arrays[0].numpy())  # int16 (s, l, k), of all tokens but the last
            weights.append(arrays[1].numpy())
        if trainer.replay_weights:
            output["routed_experts"] = RoutingRecords.from_requests(output["routed_experts"], weights=weights)
        trainer.sampled = pad([torch.tensor(logps) for logps in output["logprobs"]], 0.0, "right")
        return output

    return roll_out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*'rollout_func', which is an experimental feature:UserWarning")
def test_it_trains_with_the_experts_that_an_engine_chose(tmp_path):
    """The engine is the model but for its routers: with its choices and weights log-probabilities are its own."""
    free = run_training(tmp_path, rollout=make_engine(), bf16=False)
    choices = run_training(tmp_path, ReplayRouting, rollout=make_engine(), bf16=False)
    whole = run_training(tmp_path, ReplayRouting, rollout=make_engine(), bf16=False, weights=True)
    print("as it is", *free, "choices", *choices, "weights too", *whole, sep="\n")
    assert whole[0][0] < 1e-4 < 0.1 < choices[0][0] < free[0][0]


class LogitsTrainer:
    """Stands for TRL's trainer: log-probabilities are logits, and a generation is one forward."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def _generate_single_turn(self, ids: Tensor) -> None:
        self.model(ids)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        return {}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids = inputs["ids"]
        return self._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 1)[0].sum()

    def _get_per_token_logps_and_entropies(
        self, model: Any, ids: Tensor, mask: Tensor, keep: int, batch_size: int | None = None
    ) -> tuple[Tensor, None, None]:
        return model(ids, attention_mask=mask).logits, None, None

    def training_step(self, loss: Any) -> None:
        loss().backward()


@contextmanager
def use_adapter(model: Any, name: str) -> Iterator[None]:
    before = model.active_adapter
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)


class ReplayTrainer(ReplayRouting, LogitsTrainer):
    replay_weights = True


def test_adapter_reference_uses_its_own_weights():
    """By its own router, the choices of the generation; as a copy of a trained adapter does."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(make_llama().eval(), config)
    model.add_adapter("ref", config)
    trainer, ids = ReplayTrainer(model), torch.randint(3, VOCABULARY, (3, 7))
    trainer._generate_single_turn(ids)
    ((records, _), *_), call = trainer._recorded_sequences, (ids, torch.ones_like(ids), 1)
    choices = RoutingRecords(records, {name: records.num_experts(name) for name in records})
    with torch.no_grad():
        assert torch.equal(trainer._get_per_token_logps_and_entropies(model, *call)[0], model(ids).logits)
        for reference in (model.disable_adapter(), use_adapter(model, "ref")):
            with reference:
                found, _, _ = trainer._get_per_token_logps_and_entropies(model, *call, batch_size=2)
                with replay_routing(model, choices):
                    torch.testing.assert_close(found, model(ids).logits)
                with replay_routing(model, records):
                    assert not torch.allclose(found, model(ids).logits, atol=1e-2)


def test_one_forward_until_its_backward():
    model, ids = make_llama(), torch.randint(3, VOCABULARY, (3, 7))
    trainer = ReplayTrainer(model)
    with torch.no_grad():
        trainer._generate_single_turn(ids)
    inputs = {"ids": ids, "routing": trainer._recorded_sequences}
    with pytest.raises(ValueError, match=r"of 3 sequences are computed with gradients in chunks of 2.*omit batch_size"):
        trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 1, batch_size=2)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    for _ in range(2):  # micro-batches, each with its backward
        trainer.training_step(lambda: trainer._compute_loss(model, inputs))
        with pytest.raises(ValueError, match="started before the first backward pass"):
            trainer.training_step(lambda: trainer._compute_loss(model, inputs) + trainer._compute_loss(model, inputs))
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_rejects_rollouts_without_choices():
    class Rolled(ReplayTrainer):
        def __init__(self, **output: Any) -> None:
            self.rollout_func = lambda prompts, trainer: output
            super().__init__(make_llama())

    ids: Any = dict(prompt_ids=[[5, 6], [7]], completion_ids=[[8, 9], [10, 11]], logprobs=None)
    choices = [torch.arange(2).expand(length, 4, 2) for length in (3, 2)]
    for given, message in {
        None: 'did not return "routed_experts"; make the engine',
        (choices[0], choices[0][:1]): r"have \[4, 3\] tokens, but their routed_experts have \[3, 1\]",
        (choices[0],): r"have \[4, 3\] tokens, but their routed_experts have \[3\]",
        tuple(choices): r"replay_weights is True, but routed_experts contains choices without weights; .*weights=",
    }.items():
        with pytest.raises(ValueError, match=message):
            Rolled(**ids, routed_experts=given).rollout_func([], None)
    records = RoutingRecords.from_requests(choices, weights=[choice.float() for choice in choices])
    trainer = Rolled(**ids, routed_experts=records, reward=1)
    assert trainer.rollout_func([], trainer) == {**ids, "reward": 1}  # what reward functions are given
    assert Rolled(completion_ids=[]).rollout_func([], None) == {"completion_ids": []}


def test_rejects_mixin_after_trainer():
    """There none of its methods would run, and the trainer would train with other experts."""
    with pytest.raises(TypeError, match=r"Own lists ReplayRouting after LogitsTrainer, .*; define class Own\(R"):
        type("Own", (LogitsTrainer, ReplayRouting), {})
    with pytest.raises(TypeError, match=r"Own lists ReplayRouting after LogitsTrainer"):
        type("Own", (LogitsTrainer, type("Mine", (ReplayRouting,), {})), {})
    type("Own", (type("Other", (), {"_generate_single_turn": None}), ReplayRouting, LogitsTrainer), {})


@pytest.mark.slow
def test_rejects_other_generation_backends(tmp_path):
    from trl import GRPOTrainer

    class Other(ReplayRouting, GRPOTrainer):
        def __init__(self, **attributes: Any) -> None:
            self.__dict__.update(attributes)
            super().__init__()

    with pytest.raises(TypeError, match="define class Trainer"):
        type("Alone", (ReplayRouting,), {})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "__init__", lambda self: None)
        with pytest.raises(ValueError, match=r"own generation, but use_vllm replaces it, .* pass a rollout_func that"):
            Other(use_vllm=True)
        with pytest.raises(ValueError, match="own generation, but tools replaces it"):
            Other(tools=[print], rollout_func=print)
        Other(
            use_vllm=True, rollout_func=print, model=make_llama()
        )  # the function asks the engine, TRL gives it weights
        with pytest.raises(ValueError, match="has no gate"):
            Other(model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"record 8 sequences, one per prompt, .*; generate with a cache"):
        run_training(tmp_path, ReplayRouting, generation_kwargs=dict(use_cache=False))
