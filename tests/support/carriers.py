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


class TheirGating(TopKGating):
    """A subclass without anything of its own."""


class TheirMoE(MoE):
    """A subclass without anything of its own."""


class Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.0


def layer(kind: type[MoE] = MoE, gate: type[TopKGating] = TopKGating) -> MoE:
    return kind(DIM, hidden_dim=16, gate=gate(DIM, EXPERTS, k=K, expert_bias=True))


@dataclass
class Carried:
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
    def ours(self) -> bool:
        """Whether the gates are of this package."""
        return isinstance(self.gates[0][0], TopKGating)


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, DIM, generator=generator), torch.randn(2, 5, DIM, generator=generator)


def named(model: nn.Module, ending: str) -> list[Tensor]:
    return [value for name, value in model.state_dict(keep_vars=True).items() if name.endswith(ending)]


def biases_of(model: nn.Module) -> list[Tensor]:
    return named(model, "expert_bias")


def plain(make: Callable[[], nn.Module] = layer, times: int = 1) -> TwoBlocks:
    torch.manual_seed(0)
    return TwoBlocks(make, times)


def carried(wrap: Callable[[TwoBlocks], Any], make: Callable[[], nn.Module] = layer, times: int = 1) -> Carried:
    twin = plain(make, times)
    gates = [(block.moe.gate,) for block in twin.blocks]
    return Carried(wrap(copy.deepcopy(twin)), twin, gates, biases_of, tokens())


def each_block(change: Callable[[Any], None]) -> Callable[[TwoBlocks], TwoBlocks]:
    def wrap(model: TwoBlocks) -> TwoBlocks:
        for block in model.blocks:
            change(block)
        return model

    return wrap


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def with_gates(wrap: Callable[[nn.Module], Any]) -> Callable[[TwoBlocks], TwoBlocks]:
    return each_block(lambda block: setattr(block.moe, "gate", wrap(block.moe.gate)))


def with_layers(wrap: Callable[[nn.Module], Any]) -> Callable[[TwoBlocks], TwoBlocks]:
    return each_block(lambda block: setattr(block, "moe", wrap(block.moe)))


def with_blocks(wrap: Callable[[nn.Module], Any]) -> Callable[[Any], Any]:
    def wrapped(model: Any) -> Any:
        model.blocks = nn.ModuleList([wrap(block) for block in model.blocks])
        return model

    return wrapped


def compile_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def parametrize_gate(block: Any) -> None:
    parametrize.register_parametrization(block.moe.gate, "w_gating", Same())


def freeze_gate(block: Any) -> None:
    block.moe.gate.requires_grad_(False)


def saved_by_peft() -> Carried:
    import peft

    twin = plain()
    config = peft.LoraConfig(r=2, target_modules=["proj"], modules_to_save=["gate"])
    wrapped = peft.get_peft_model(copy.deepcopy(twin), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" not in name and "lora_A" not in name:
            parameter.requires_grad_(True)  # so that gradients are those of the twin
    gates = [(block.moe.gate,) for block in twin.blocks]
    return Carried(
        wrapped,
        twin,
        gates,
        lambda model: [bias for name, bias in model.named_buffers() if name.endswith("default.expert_bias")],
        tokens(),
        lambda model: [bias for name, bias in model.named_buffers() if name.endswith("original_module.expert_bias")],
    )


def one_gate_in_two_layers() -> Carried:
    twin = plain()
    twin.blocks[1].moe.gate.load_state_dict(twin.blocks[0].moe.gate.state_dict())
    model = copy.deepcopy(twin)
    model.blocks[1].moe.gate = model.blocks[0].moe.gate
    gates = [(twin.blocks[0].moe.gate, twin.blocks[1].moe.gate)]
    return Carried(model, twin, gates, lambda model: biases_of(model)[:1], tokens())


def under_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def under_fsdp(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block.moe, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batches() -> tuple[Any, Any]:
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


def upcycled() -> Carried:
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
    return Carried(model, twin, gates, biases_of, batches())


def mixtral() -> Carried:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=K)
    model = transformers.MixtralForCausalLM(config)
    twin = copy.deepcopy(model)
    gates = [(block.mlp.gate,) for block in twin.model.layers]
    return Carried(model, twin, gates, biases_of, batches())


CARRIERS: Mapping[str, Callable[[], Carried]] = {
    "plain": lambda: carried(lambda model: model),
    "compiled gate": lambda: carried(with_gates(compiled)),
    "compiled layer": lambda: carried(with_layers(compiled)),
    "compiled block": lambda: carried(with_blocks(compiled)),
    "compiled model": lambda: carried(compiled),
    "compiled in place": lambda: carried(compile_in_place),
    "checkpointed gate": lambda: carried(with_gates(checkpoint_wrapper)),
    "checkpointed layer": lambda: carried(with_layers(checkpoint_wrapper)),
    "checkpointed block": lambda: carried(with_blocks(checkpoint_wrapper)),
    "gate saved by PEFT": saved_by_peft,
    "parametrized gate": lambda: carried(each_block(parametrize_gate)),
    "subclasses": lambda: carried(lambda model: model, lambda: layer(TheirMoE, TheirGating)),
    "one gate in two layers": one_gate_in_two_layers,
    "layers called twice": lambda: carried(lambda model: model, times=2),
    "frozen gate": lambda: carried(each_block(freeze_gate)),
    "DDP": lambda: carried(under_ddp),
    "FSDP2": lambda: carried(under_fsdp),
    "upcycled Llama": upcycled,
    "Mixtral": mixtral,
}
ONE_RANK = ("DDP", "FSDP2")  # need a process group
OF_TRANSFORMERS = ("upcycled Llama", "Mixtral")


def run(model: nn.Module, inputs: Any) -> Tensor:
    """The model's output."""
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs).logits


def observe(carried: Carried, inputs: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the twin does with these inputs: for each site the choices `(calls, b, n, k)` and the loads `(e,)`; and the
    auxiliary losses of all calls of layers."""
    found: dict[nn.Module, list[Tensor]] = {}
    losses: list[Tensor] = []

    def of_gate(gate: nn.Module, args: object, output: Any) -> None:
        expert = output[2] if isinstance(output, tuple) else output.expert
        found.setdefault(gate, []).append(expert.reshape(2, -1, K))

    handles = [gate.register_forward_hook(of_gate) for site in carried.gates for gate in site]
    layers = [module for module in carried.twin.modules() if isinstance(module, MoE)]
    handles += [each.register_forward_hook(lambda layer, args, output: losses.append(output[1])) for each in layers]
    run(carried.twin, inputs)
    for handle in handles:
        handle.remove()
    choices = [torch.stack([each for gate in site for each in found[gate]]) for site in carried.gates]
    return choices, [torch.bincount(each.flatten(), minlength=EXPERTS) for each in choices], losses
