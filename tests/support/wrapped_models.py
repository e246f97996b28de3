"""What a gate, a layer or a model may be wrapped in, for the table of abilities over carriers.

A carrier gives two models of the same weights: one as a user has it, wrapped, and its plain twin. What the gates of the
twin choose is observed by hooks of this file alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

from mixture_of_experts import MoE, TopKGating

DIM, EXPERTS, K = 8, 4, 2


class FeedForward(nn.Module):
    """Returns the output of a layer alone, after a linear layer of its own."""

    def __init__(self, moe: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, DIM, bias=False)
        self.moe, self.times = moe, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.moe(self.proj(x))[0]
        return x


class TwoBlocks(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], times: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([FeedForward(make(), times) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class GatingSubclass(TopKGating):
    """A subclass without anything of its own."""


class MoESubclass(MoE):
    """A subclass without anything of its own."""


class Identity(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.0


def make_layer(kind: type[MoE] = MoE, gate: type[TopKGating] = TopKGating) -> MoE:
    return kind(DIM, hidden_dim=16, gate=gate(DIM, EXPERTS, k=K, expert_bias=True))


@dataclass
class WrappedModel:
    """A wrapped model and its twin.

    Attributes:
        model: the model that a user calls.
        twin: a plain model of the same weights.
        gates: of the twin, in its order; each stands for one site of the model. Two gates in a tuple are one there.
        biases: the buffers or parameters of the model that hold the bias of each site.
        untouched: biases of the model that nobody may move.
        inputs: what the model is given, and other tokens.
    """

    model: Any
    twin: Any
    gates: list[tuple[Any, ...]]
    biases: Callable[[Any], list[Tensor]]
    inputs: tuple[Any, Any]
    untouched: Callable[[Any], list[Tensor]] = lambda model: []

    @property
    def has_our_gates(self) -> bool:
        """Whether the gates are of this package."""
        return isinstance(self.gates[0][0], TopKGating)


def make_tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, DIM, generator=generator), torch.randn(2, 5, DIM, generator=generator)


def find_state(model: nn.Module, ending: str) -> list[Tensor]:
    return [value for name, value in model.state_dict(keep_vars=True).items() if name.endswith(ending)]


def find_biases(model: nn.Module) -> list[Tensor]:
    return find_state(model, "expert_bias")


def make_plain(make: Callable[[], nn.Module] = make_layer, times: int = 1) -> TwoBlocks:
    torch.manual_seed(0)
    return TwoBlocks(make, times)


def make_wrapped(
    wrap: Callable[[TwoBlocks], Any], make: Callable[[], nn.Module] = make_layer, times: int = 1
) -> WrappedModel:
    twin = make_plain(make, times)
    gates = [(block.moe.gate,) for block in twin.blocks]
    return WrappedModel(wrap(copy.deepcopy(twin)), twin, gates, find_biases, make_tokens())


def apply_to_blocks(change: Callable[[Any], None]) -> Callable[[TwoBlocks], TwoBlocks]:
    def wrap(model: TwoBlocks) -> TwoBlocks:
        for block in model.blocks:
            change(block)
        return model

    return wrap


def compile_eager(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def wrap_gates(wrap: Callable[[nn.Module], Any]) -> Callable[[TwoBlocks], TwoBlocks]:
    return apply_to_blocks(lambda block: setattr(block.moe, "gate", wrap(block.moe.gate)))


def wrap_layers(wrap: Callable[[nn.Module], Any]) -> Callable[[TwoBlocks], TwoBlocks]:
    return apply_to_blocks(lambda block: setattr(block, "moe", wrap(block.moe)))


def wrap_blocks(wrap: Callable[[nn.Module], Any]) -> Callable[[Any], Any]:
    def wrapped(model: Any) -> Any:
        model.blocks = nn.ModuleList([wrap(block) for block in model.blocks])
        return model

    return wrapped


def compile_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def parametrize_gate(block: Any) -> None:
    parametrize.register_parametrization(block.moe.gate, "w_gating", Identity())


def freeze_gate(block: Any) -> None:
    block.moe.gate.requires_grad_(False)


def make_peft_model() -> WrappedModel:
    import peft

    twin = make_plain()
    config = peft.LoraConfig(r=2, target_modules=["proj"], modules_to_save=["gate"])
    wrapped = peft.get_peft_model(copy.deepcopy(twin), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" not in name and "lora_A" not in name:
            parameter.requires_grad_(True)  # so that gradients are those of the twin
    gates = [(block.moe.gate,) for block in twin.blocks]
    return WrappedModel(
        wrapped,
        twin,
        gates,
        lambda model: [bias for name, bias in model.named_buffers() if name.endswith("default.expert_bias")],
        make_tokens(),
        lambda model: [bias for name, bias in model.named_buffers() if name.endswith("original_module.expert_bias")],
    )


def share_gate() -> WrappedModel:
    twin = make_plain()
    twin.blocks[1].moe.gate.load_state_dict(twin.blocks[0].moe.gate.state_dict())
    model = copy.deepcopy(twin)
    model.blocks[1].moe.gate = model.blocks[0].moe.gate
    gates = [(twin.blocks[0].moe.gate, twin.blocks[1].moe.gate)]
    return WrappedModel(model, twin, gates, lambda model: find_biases(model)[:1], make_tokens())


def wrap_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def wrap_fsdp(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block.moe, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_batches() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32, (2, 2, 5), generator=generator)
    return tuple({"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids)  # pyright: ignore


SIZES = dict(
    vocab_size=32,
    hidden_size=DIM,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=16,
)


def make_upcycled() -> WrappedModel:
    import transformers

    from mixture_of_experts.huggingface import upcycle

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    upcycle(model, EXPERTS, k=K, gate=lambda dim, experts: TopKGating(dim, experts, k=K, expert_bias=True))
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # copies of one network would give the same outputs, whatever is chosen
            nn.init.normal_(parameter)
    twin = copy.deepcopy(model)
    gates = [(block.mlp.moe.gate,) for block in twin.model.layers]
    return WrappedModel(model, twin, gates, find_biases, make_batches())


def make_mixtral() -> WrappedModel:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=K)
    model = transformers.MixtralForCausalLM(config)
    twin = copy.deepcopy(model)
    gates = [(block.mlp.gate,) for block in twin.model.layers]
    return WrappedModel(model, twin, gates, find_biases, make_batches())


WRAPPED_MODELS: Mapping[str, Callable[[], WrappedModel]] = {
    "plain": lambda: make_wrapped(lambda model: model),
    "compiled gate": lambda: make_wrapped(wrap_gates(compile_eager)),
    "compiled layer": lambda: make_wrapped(wrap_layers(compile_eager)),
    "compiled block": lambda: make_wrapped(wrap_blocks(compile_eager)),
    "compiled model": lambda: make_wrapped(compile_eager),
    "compiled in place": lambda: make_wrapped(compile_in_place),
    "checkpointed gate": lambda: make_wrapped(wrap_gates(checkpoint_wrapper)),
    "checkpointed layer": lambda: make_wrapped(wrap_layers(checkpoint_wrapper)),
    "checkpointed block": lambda: make_wrapped(wrap_blocks(checkpoint_wrapper)),
    "gate saved by PEFT": make_peft_model,
    "parametrized gate": lambda: make_wrapped(apply_to_blocks(parametrize_gate)),
    "subclasses": lambda: make_wrapped(lambda model: model, lambda: make_layer(MoESubclass, GatingSubclass)),
    "one gate in two layers": share_gate,
    "layers called twice": lambda: make_wrapped(lambda model: model, times=2),
    "frozen gate": lambda: make_wrapped(apply_to_blocks(freeze_gate)),
    "DDP": lambda: make_wrapped(wrap_ddp),
    "FSDP2": lambda: make_wrapped(wrap_fsdp),
    "upcycled Llama": make_upcycled,
    "Mixtral": make_mixtral,
}
SINGLE_RANK = ("DDP", "FSDP2")  # need a process group
TRANSFORMERS_ONLY = ("upcycled Llama", "Mixtral")


def run_model(model: nn.Module, inputs: Any) -> Tensor:
    """The model's output."""
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs).logits


def observe_choices(carried: WrappedModel, inputs: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the twin does with these inputs: for each site the choices `(calls, b, n, k)` and the loads `(e,)`; and the
    auxiliary losses of all calls of layers."""
    found: dict[nn.Module, list[Tensor]] = {}
    losses: list[Tensor] = []

    def of_gate(gate: nn.Module, args: object, output: Any) -> None:
        expert = output[2] if isinstance(output, tuple) else output.expert
        found.setdefault(gate, []).append(expert.reshape(2, -1, K))

    handles = [gate.register_forward_hook(of_gate) for router in carried.gates for gate in router]
    layers = [module for module in carried.twin.modules() if isinstance(module, MoE)]
    handles += [each.register_forward_hook(lambda layer, args, output: losses.append(output[1])) for each in layers]
    run_model(carried.twin, inputs)
    for handle in handles:
        handle.remove()
    choices = [torch.stack([each for gate in router for each in found[gate]]) for router in carried.gates]
    return choices, [torch.bincount(each.flatten(), minlength=EXPERTS) for each in choices], losses
