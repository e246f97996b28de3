"""What an earlier version of the package wrote, and what it computed with that: `tests/written`.

    python -m tests.support.earlier_versions    # write what is missing; what is there stays as an earlier version wrote
    it

Each thing is a function that writes it into a folder, and one that reads it and returns tensors. The tensors of the
version that wrote are kept in `expected.pt`.
"""

from __future__ import annotations

import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from mixture_of_experts import ExpertList, Experts, GatedExperts, HeirarchicalMoE, MoE, TopKGating, recipes
from mixture_of_experts.gating import SparseMixerGating
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.replay import RoutingRecords, record_routing, replay_routing
from mixture_of_experts.stats import track_routing
from mixture_of_experts.wrappers import InputWeightedExperts, LatentExperts, NormedExperts, ZeroComputationExperts

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import layer_variants

ROOT = Path(__file__).parents[1] / "written"
EXPECTED = "expected.pt"
DIM, EXPERTS = 8, 4
Tensors = dict[str, Tensor]


class Sample(NamedTuple):
    """A thing: how it is written into a folder, and read from it."""

    write: Callable[[Path], None]
    read: Callable[[Path], Tensors]


def make_tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# Layers: state dicts, pickles, a distributed checkpoint, exported programs


def make_layer(experts: nn.Module) -> MoE:
    return MoE(DIM, gate=TopKGating(DIM, EXPERTS, expert_bias=True, bias=True), experts=experts)


LAYERS: dict[str, Callable[[], Any]] = {
    "MoE": lambda: MoE(DIM, EXPERTS, second_policy_eval="all"),
    "HeirarchicalMoE": lambda: HeirarchicalMoE(DIM, (2, 2), second_policy_eval="all"),
    "biases": lambda: make_layer(Experts(DIM, EXPERTS, 12, bias=True, dim_out=DIM)),
    "gated": lambda: make_layer(GatedExperts(DIM, EXPERTS, 12, bias=True)),
    "list": lambda: make_layer(ExpertList([nn.Linear(DIM, DIM) for _ in range(EXPERTS)])),
    "enclosed": lambda: make_layer(
        LatentExperts(GatedExperts(5, EXPERTS, 12), before=nn.Linear(DIM, 5), after=nn.Linear(5, DIM))
    ),
    "beside identity": lambda: make_layer(ZeroComputationExperts(GatedExperts(DIM, EXPERTS - 1, 12), num_identity=1)),
    "normed": lambda: make_layer(NormedExperts(GatedExperts(DIM, EXPERTS, 12), nn.RMSNorm(DIM, eps=1e-6))),
    "weighted inputs": lambda: make_layer(InputWeightedExperts(GatedExperts(DIM, EXPERTS, 12))),
    "8 bits": lambda: quantize_experts(MoE(DIM, gate=TopKGating(DIM, EXPERTS)).requires_grad_(False)),
    "sparse mixer": lambda: MoE(DIM, gate=SparseMixerGating(DIM, EXPERTS)),
    "recipe": lambda: recipes.deepseek_v3(DIM, EXPERTS, 12, k=2, num_groups=2, top_groups=1),
    **{
        f"router {name}": lambda name=name: layer_variants.make_layer_with_router(name)
        for name in layer_variants.ROUTERS
    },
}


def compute_outputs(layer: Any) -> Tensors:
    with torch.no_grad():
        torch.manual_seed(0)
        out, aux_loss = layer.eval()(make_tokens(2, 10, layer.dim))
    return {"out": out, "aux_loss": aux_loss}


def write_states(folder: Path) -> None:
    states = {}
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        states[name] = make().state_dict()
    torch.save(states, folder / "states.pt")


def read_states(folder: Path) -> Tensors:
    found = {}
    for name, state in torch.load(folder / "states.pt", weights_only=True).items():
        torch.manual_seed(1)  # other weights than those that are loaded
        layer = LAYERS[name]()
        layer.load_state_dict(state)
        found |= {f"{name}: {part}": value for part, value in compute_outputs(layer).items()}
    return found


def write_pickles(folder: Path) -> None:
    for name, layer in (("top2", MoE(DIM, EXPERTS, second_policy_eval="all")), ("recipe", LAYERS["recipe"]())):
        torch.save(layer, folder / f"{name}.pt")
    gate = TopKGating(DIM, EXPERTS, expert_bias=True, group_score="best", num_groups=2, top_groups=1)
    (folder / "gate.pickle").write_bytes(pickle.dumps(gate))
    moe = MoE(DIM, gate=gate)
    with record_routing(moe, weights=True) as records:
        moe(make_tokens(2, 10, DIM))
    records.save(folder / "records.pt")
    (folder / "records.pickle").write_bytes(pickle.dumps(RoutingRecords.load(folder / "records.pt")))
    with track_routing(moe) as stats:
        moe(make_tokens(2, 10, DIM))
    (folder / "statistics.pickle").write_bytes(pickle.dumps(stats.latest()))


def read_pickles(folder: Path) -> Tensors:
    found = {}
    for name in ("top2", "recipe"):
        layer = torch.load(folder / f"{name}.pt", weights_only=False)
        found |= {f"{name}: {part}": value for part, value in compute_outputs(layer).items()}
    gate = pickle.loads((folder / "gate.pickle").read_bytes())
    torch.manual_seed(2)
    moe = MoE(DIM, gate=gate)
    of_pickle: RoutingRecords = pickle.loads((folder / "records.pickle").read_bytes())
    for name, records in (("pickled", of_pickle), ("saved", RoutingRecords.load(folder / "records.pt"))):
        with replay_routing(moe, records):
            found |= {f"replayed, {name}: {part}": value for part, value in compute_outputs(moe).items()}
    (record,) = pickle.loads((folder / "statistics.pickle").read_bytes())
    numbers = {name: value for name, value in vars(record).items() if isinstance(value, Tensor | float | int)}
    return found | {f"statistics: {name}": torch.as_tensor(value) for name, value in numbers.items()}


def train_layer() -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(3)
    layer = LAYERS["recipe"]()
    optimizer = torch.optim.AdamW(layer.parameters())
    out, aux_loss = layer(make_tokens(2, 10, DIM))
    (out.square().mean() + aux_loss).backward()
    optimizer.step()
    return layer, optimizer


def write_dcp(folder: Path) -> None:
    layer, optimizer = train_layer()
    dcp.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder, no_dist=True)


def read_dcp(folder: Path) -> Tensors:
    layer, optimizer = train_layer()
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    state = {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    layer.load_state_dict(state["model"])
    moments = {f"moment {i}": s["exp_avg"] for i, s in state["optimizer"]["state"].items()}
    return {**compute_outputs(layer), **moments}


def write_exported(folder: Path) -> None:
    torch.manual_seed(0)
    dynamic = torch.export.Dim.DYNAMIC
    layer, x = LAYERS["MoE"]().eval(), make_tokens(2, 10, DIM)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: dynamic, 1: dynamic},))
    torch.export.save(program, folder / "layer.pt2")
    torch.export.save(torch.export.export(layer.gate, (x,)), folder / "gate.pt2")


def read_exported(folder: Path) -> Tensors:
    out, aux_loss = torch.export.load(folder / "layer.pt2").module()(make_tokens(3, 7, DIM))
    routing = torch.export.load(folder / "gate.pt2").module()(make_tokens(2, 10, DIM))
    dispatch, combine, loss = routing
    of_gate = {"dispatch": dispatch, "combine": combine, "loss": loss, "weight": routing.weight}
    return {"out": out, "aux_loss": aux_loss, **of_gate}


# Folders of models of transformers


IDS = (torch.arange(18) * 7 % 32).view(2, 9)


def make_tiny_model(kind: str, dim: int = DIM) -> Any:
    import transformers

    settings = dict(
        vocab_size=32,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    if kind == "Mixtral":
        settings |= dict(num_local_experts=EXPERTS)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def make_upcycled(dim: int = DIM) -> Any:
    from mixture_of_experts.huggingface import upcycle

    model = make_tiny_model("Llama", dim)
    upcycle(model, num_experts=EXPERTS, noise=0.1, redraw=0.5)
    return model


def write_folders(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from mixture_of_experts.huggingface import from_transformers, prune

    make_upcycled().save_pretrained(folder / "upcycled")
    converted = make_tiny_model("Mixtral")
    from_transformers(converted)
    converted.save_pretrained(folder / "converted")
    prune(converted, 3, by="random")
    converted.save_pretrained(folder / "pruned")
    in_int8 = make_upcycled()
    quantize_experts(in_int8.requires_grad_(False)).save_pretrained(folder / "int8")
    experts = [name for name, _ in make_upcycled().named_parameters() if name.endswith(("experts.w1", "experts.w2"))]
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    torch.manual_seed(1)
    get_peft_model(make_upcycled(), lora).save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()


def read_folders(folder: Path) -> Tensors:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import mixture_of_experts.huggingface  # noqa: F401  (it reads the folders)

    found = {}
    for name in ("upcycled", "converted", "pruned", "int8"):
        found[name] = AutoModelForCausalLM.from_pretrained(folder / name)
    base = AutoModelForCausalLM.from_pretrained(folder / "upcycled")
    found["adapter"] = PeftModel.from_pretrained(base, folder / "adapter")
    with torch.no_grad():
        return {name: model.eval()(IDS).logits for name, model in found.items()}


# Experts in 4 bits: a state and a pickle, with the bytes as a CPU wants them, and a folder, with plain ones


GROUP = 32  # the smallest, which divides all sizes


def make_4_bit_layer() -> Any:
    return quantize_experts(MoE(GROUP, gate=TopKGating(GROUP, EXPERTS)).requires_grad_(False), 4, group=GROUP)


def write_4_bits(folder: Path) -> None:
    layer = make_4_bit_layer()
    torch.save(layer.state_dict(), folder / "state.pt")
    torch.save(layer, folder / "layer.pt")
    quantize_experts(make_upcycled(GROUP).requires_grad_(False), 4, group=GROUP).save_pretrained(folder / "folder")


def read_4_bits(folder: Path) -> Tensors:
    """In float64, in which no CPU multiplies with the bytes."""
    from transformers import AutoModelForCausalLM

    import mixture_of_experts.huggingface  # noqa: F401  (it reads the folder)

    torch.manual_seed(1)
    loaded = make_4_bit_layer()
    loaded.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    layers = {"state": loaded, "pickle": torch.load(folder / "layer.pt", weights_only=False)}
    x = make_tokens(2, 10, GROUP).double()
    with torch.no_grad():
        found = {name: layer.double().eval()(x)[0] for name, layer in layers.items()}
        return found | {"folder": AutoModelForCausalLM.from_pretrained(folder / "folder").double()(IDS).logits}


SAMPLES = {
    "states": Sample(write_states, read_states),
    "pickles": Sample(write_pickles, read_pickles),
    "dcp": Sample(write_dcp, read_dcp),
    "exported": Sample(write_exported, read_exported),
    "folders": Sample(write_folders, read_folders),
    "4_bits": Sample(write_4_bits, read_4_bits),
}


def main() -> None:
    for name, thing in SAMPLES.items():
        if (ROOT / name).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            thing.write(Path(folder))
            torch.save(thing.read(Path(folder)), Path(folder, EXPECTED))
            ROOT.mkdir(exist_ok=True)
            shutil.copytree(folder, ROOT / name)
        print(f"wrote {ROOT / name}")


if __name__ == "__main__":
    main()
