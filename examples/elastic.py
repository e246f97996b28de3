"""Train an upcycled causal model on nodes that fail and join: FSDP2, expert parallelism, checkpoints, restarts.

    torchrun examples/elastic.py  # one process, small model; --model FOLDER_OR_NAME trains another

docs/distributed/trainers.md lists the commands for several nodes. This program needs the extra `hf`, and `--out` must
be on a shared file system.
"""

import argparse
import math
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from mixture_of_experts import MoE
from mixture_of_experts.huggingface import upcycle
from mixture_of_experts.parallel import ExpertParallel, clip_grad_norm_, fully_shard_experts, parallelize_module

SMALL = dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
OPTIONS = dict(model="", out="runs/elastic", steps=300, batch=8, context=64, rate=3e-4, save_every=20, timeout=60.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=f"{default!r}")
    parser.add_argument("--bfloat16", action="store_true", help="use autocast; routers still compute in float32")
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device("cuda")
    dist.init_process_group(timeout=timedelta(seconds=args.timeout))  # ranks give up after this time
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # all ranks must start with the same model
    model, to_tokens = load_model(args.model)
    shard_model(model, world)
    by_mesh: dict[object, list[Tensor]] = {}
    for parameter in model.parameters():
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters in by_mesh.values()], lr=args.rate)
    done = load_checkpoint(args.out, model, optimizer)["step"] if list_checkpoints(args.out) else 0
    tokens = to_tokens("".join(map(Path.read_text, sorted(Path(os.__file__).parent.glob("a*.py")))))  # your text here
    for step in range(done + 1, args.steps + 1):
        torch.manual_seed(step)  # the batch does not depend on the number of ranks, which must divide it
        starts = torch.randint(len(tokens) - args.context, (args.batch,)).tolist()
        own = torch.stack([tokens[start : start + args.context] for start in starts[rank::world]])
        with torch.autocast(own.device.type, torch.bfloat16, enabled=args.bfloat16):
            loss = model(own, labels=own).loss  # includes the auxiliary loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach() / world)
        if rank == 0:
            print(f"step {step} of {args.steps}, {world} ranks: loss {loss.item():.4f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save_checkpoint(args.out, model, optimizer, step=step, extra={"step": step})
    dist.destroy_process_group()


def load_model(name: str) -> tuple[nn.Module, Callable[[str], Tensor]]:
    """Load a mixture, or upcycle a dense model. Also return a function that converts text to tokens (n,)."""
    model = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
        if name
        else LlamaForCausalLM(LlamaConfig(**SMALL))
    )
    if not any(isinstance(module, MoE) for module in model.modules()):
        upcycle(model, 8, k=2)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False).encode if name else str.encode
    return model.train(), lambda text: torch.tensor(list(tokenizer(text)))


def shard_model(model: nn.Module, world: int) -> None:
    """Shard the experts over as many ranks as divide them, and replicate these shards on the other ranks.

    All other parameters are sharded over all ranks.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoE)}
    ranks = math.gcd(world, *(layer.num_experts for layer in layers.values()))
    mesh = init_device_mesh(next(model.parameters()).device.type, (world // ranks, ranks), mesh_dim_names=("dp", "ep"))
    everyone = mesh["dp", "ep"]._flatten("batch")
    parallelize_module(model, mesh["ep"], dict.fromkeys(layers, ExpertParallel(batch_group=everyone)))
    for layer in layers.values():
        fully_shard_experts(layer, mesh=mesh["dp"])
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=everyone)


if __name__ == "__main__":
    main()
