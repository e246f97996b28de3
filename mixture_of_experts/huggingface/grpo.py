"""Routing replay for TRL's `GRPOTrainer`, which makes training use the experts that were chosen during generation. This
module does not import TRL."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.huggingface.private_peft import is_peft_wrapper
from mixture_of_experts.replay import RoutingRecords, record_routing, replay_routing

TRAINER_METHODS = (
    "_generate_single_turn",
    "_generate_and_score_completions",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
)
GENERATION_ENGINE_FLAGS = ("use_vllm", "use_transformers_continuous_batching")
SequenceReference = tuple[RoutingRecords, int]  # a generation's records, and the index of one of its sequences


class ReplayRouting:
    """A mixin that makes TRL's `GRPOTrainer` compute log-probabilities with the experts chosen during generation.

    List this class before the trainer: `class Trainer(ReplayRouting, GRPOTrainer): ...`.

    The mixin records the experts that the model chooses while the trainer generates completions. If an inference engine
    generates the completions instead, the trainer's `rollout_func` must return the engine's choices for prompts and
    completions in an additional field named "routed_experts". Its value is a `RoutingRecords` object, or a list of the
    objects that `RoutingRecords.from_requests` accepts.

    The choices are replayed in every forward pass that computes log-probabilities of these completions: during training
    (in all mini-batches and iterations), when old log-probabilities are computed, and during evaluation. The last token
    of a completion was never an input to the model, so the gates choose its experts. A separate reference model makes
    its own choices. With PEFT, the reference model is the model without its adapter. This reference model also replays
    the choices, but uses its own router weights.

    Raises:
        ValueError: raised by the constructor if the model has no gate or the trainer uses an unsupported generation
            method (tools; vLLM or continuous batching without `rollout_func`). Also raised during training if
            generation does not use a cache, if `rollout_func` returns no choices or choices that do not match its
            tokens, if a prompt contains images, or if log-probabilities with gradients are computed in chunks or twice
            before a backward pass.
        TypeError: a subclass lists this class after the trainer (raised when the subclass is defined). Also raised by
            the constructor if the trainer lacks a TRL method that this class needs, or if a gate's choices or weights
            cannot be recorded.
    """

    #: whether to record and replay weights in addition to choices; set it in your subclass
    replay_weights: bool = False
    model: Any
    ref_model: Any = None
    rollout_func: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base_classes = [kind for kind in cls.__mro__ if kind is ReplayRouting or not issubclass(kind, ReplayRouting)]
        *before, last = [kind for kind in base_classes if TRAINER_METHODS[0] in vars(kind)]
        if before and last is ReplayRouting:
            raise TypeError(
                f"{cls.__name__} lists ReplayRouting after {before[0].__name__}, whose methods would bypass it; define "
                f"class {cls.__name__}(ReplayRouting, {before[0].__name__})"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if missing := [name for name in TRAINER_METHODS if not hasattr(self._trainer, name)]:
            raise TypeError(
                f"no base class of {type(self).__name__} after ReplayRouting has the method {missing[0]}; define class "
                "Trainer(ReplayRouting, GRPOTrainer), and use a TRL version that has this method, such as 1.16"
            )
        replaced_by = ("tools",) if self.rollout_func else ("tools", *GENERATION_ENGINE_FLAGS)
        if other := [name for name in replaced_by if getattr(self, name, None)]:
            raise ValueError(
                f"ReplayRouting records the trainer's own generation, but {other[0]} replaces it, and TRL does not "
                f"pass on the engine's choices. Remove {other[0]}, and pass a rollout_func that queries your engine "
                "and returns its choices as 'routed_experts' in addition to the token ids"
            )
        self._recorded_sequences: list[SequenceReference] = []  # sequences whose log-probabilities are computed next
        self._replay_stack = ExitStack()  # contexts that stay active until the backward pass has ended
        self._replay_is_active = False  # whether `_replay_stack` contains the replay of a forward pass
        with self._record_generation():
            pass  # raises an error if the model cannot be recorded
        if self.rollout_func:
            self.rollout_func = partial(self._run_rollout, self.rollout_func)

    @property
    def _trainer(self) -> Any:
        """The `super()` proxy, which calls the trainer's own methods."""
        return super()

    def _record_generation(self) -> Any:
        return record_routing(self.model, weights=self.replay_weights)

    def _generate_single_turn(self, prompt_ids: list[Any], *args: Any, **kwargs: Any) -> Any:
        with self._record_generation() as records:
            generated = self._trainer._generate_single_turn(prompt_ids, *args, **kwargs)
        if records.num_sequences != len(prompt_ids):
            raise ValueError(
                f"expected to record {len(prompt_ids)} sequences, one per prompt, but recorded "
                f"{records.num_sequences}; generate with a cache (use_cache=True)"
            )
        self._recorded_sequences = [(records, number) for number in range(len(prompt_ids))]
        return generated

    def _run_rollout(self, rollout: Any, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Run a rollout function and store the expert choices that it returns. Return the other fields of its
        output."""
        output = dict(rollout(prompts, trainer))
        if "prompt_ids" not in output or "completion_ids" not in output:
            return output  # the trainer's own error reports what is missing
        given = output.pop("routed_experts", None)
        if given is None:
            raise ValueError(
                'rollout_func did not return "routed_experts"; make the engine return expert choices, and return them '
                "as RoutingRecords or as a list that RoutingRecords.from_requests accepts"
            )
        records = given if isinstance(given, RoutingRecords) else RoutingRecords.from_requests(given)
        numbers = [len(a) + len(b) for a, b in zip(output["prompt_ids"], output["completion_ids"], strict=True)]
        lengths = records.lengths(records.layers[0])
        if len(lengths) != len(numbers) or any(n - m not in (0, 1) for n, m in zip(numbers, lengths, strict=True)):
            raise ValueError(
                f"prompts and completions have {numbers} tokens, but their routed_experts have {lengths}; return "
                "choices for all prompt and completion tokens, or for all but the last, which engines do not process"
            )
        if self.replay_weights and records.weights is None:
            raise ValueError(
                "replay_weights is True, but routed_experts contains choices without weights; return "
                "RoutingRecords.from_requests(..., weights=...), or set replay_weights to False"
            )
        records = records if self.replay_weights else RoutingRecords(records)
        self._recorded_sequences = [(records, number) for number in range(len(numbers))]
        return output

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = self._trainer._generate_and_score_completions(inputs)
        # the records are a list, because the trainer shuffles and splits them along with the other fields
        return {**batch, "routing": self._recorded_sequences}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._recorded_sequences = inputs["routing"]
        return self._trainer._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logps_of = self._trainer._get_per_token_logps_and_entropies
        if model is self.ref_model:
            return logps_of(model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)
        if images := [name for name, value in kwargs.items() if isinstance(value, (Tensor, list))]:
            raise ValueError(f"ReplayRouting supports only text prompts, but got {', '.join(images)}")
        size, found = batch_size or len(input_ids), []
        if torch.is_grad_enabled():
            self._check_single_forward(len(input_ids), size)
        for start in range(0, len(input_ids), size):
            part = slice(start, start + size)
            ids, mask, numbers = (
                input_ids[part],
                attention_mask[part],
                [number for _, number in self._recorded_sequences[part]],
            )
            # finished rows keep generating until the longest sequence has ended
            records = self._recorded_sequences[0][0].select(numbers, mask.sum(dim=-1).tolist())
            records = RoutingRecords(records) if is_reference_model(model) else records
            with ExitStack() as forward:  # the backward pass may rerun the model
                replay = self._replay_stack if torch.is_grad_enabled() else forward
                replay.enter_context(replay_routing(model, records, beyond="choose"))
                found.append(logps_of(model, ids, mask, logits_to_keep, **kwargs))
        logps, entropies, losses = zip(*found, strict=True)
        return (
            torch.cat(logps),
            None if entropies[0] is None else torch.cat(entropies),
            None if losses[0] is None else torch.stack(losses).mean(),
        )

    def _check_single_forward(self, number: int, size: int) -> None:
        """Raise ValueError if a second forward pass with gradients starts before the backward pass of the first,
        because a recomputation could then belong to either pass."""
        if size < number:
            raise ValueError(
                f"the log-probabilities of {number} sequences are computed with gradients in chunks of {size}, but "
                "ReplayRouting can replay only one forward pass before its backward pass; omit batch_size in this call"
            )
        if self._replay_is_active:
            raise ValueError(
                "a second forward pass with gradients started before the first backward pass, but ReplayRouting "
                "replays one forward pass at a time; compute both losses from a single forward pass in training_step"
            )
        self._replay_is_active = True
        self._replay_stack.callback(setattr, self, "_replay_is_active", False)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the trainer's step, and keep the replay active until the backward pass has ended."""
        with self._replay_stack:
            return self._trainer.training_step(*args, **kwargs)


def is_reference_model(model: torch.nn.Module) -> bool:
    """Return whether a model currently acts as its own reference model, either with its PEFT adapters disabled or with
    TRL's adapter copy "ref"."""
    return any(
        getattr(each, "disable_adapters", False) is True or "ref" in getattr(each, "active_adapters", ())
        for each in model.modules()
        if is_peft_wrapper(each)
    )
