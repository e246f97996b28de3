"""Train the language model from gpt.py on several processes, with DDP or FSDP2 and optional expert parallelism.

    torchrun --nproc-per-node 2 examples/train_distributed.py --data-parallel fsdp2 --expert-ranks 2
    torchrun --nproc-per-node 8 examples/train_distributed.py --dim 256 --depth 8 --bfloat16  # DDP

If GPUs are available, the program uses NCCL and one GPU for each process, otherwise gloo. A restarted run continues
from `--out`, even with a different number of processes or another layout. gpt.py and checkpoints.py must be in the same
folder.
"""

import argparse
import os
import sysconfig
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from gpt import GPT
from mixture_of_experts.parallel import (
    ExpertParallel,
    average_gradients,
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
    ignore_experts_in_ddp,
    parallelize_module,
)

DEFAULTS = dict(steps=300, dim=96, depth=3, context=128, batch=16, rate=3e-3, save_every=100, out="runs/distributed")


def parallelize(model, mesh, style):
    """Return the parallel model, and a function to call before gradients are clipped."""
    everyone = mesh["dp", "ep"]._flatten("batch")
    if mesh["ep"].size() > 1:
        experts = ExpertParallel(batch_group=everyone)  # computes the load-balancing loss over the batch of all ranks
        parallelize_module(model, mesh["ep"], {"blocks.*.moe": experts})
    else:
        for block in model.blocks:
            block.moe.gate.process_group = everyone.get_group()
    if style == "fsdp2":
        for block in model.blocks:
            if mesh["ep"].size() > 1:
                fully_shard_experts(block.moe, mesh=mesh["dp"])
            fully_shard(block, mesh=everyone)
        return fully_shard(model, mesh=everyone), lambda: None
    sharded = expert_parameters(model).values()  # DDP ignores these; empty without expert parallelism
    for parameter in sharded:
        dist.broadcast(parameter.detach().to_local(), group=mesh["dp"].get_group(), group_src=0)
    parallel = DistributedDataParallel(ignore_experts_in_ddp(model))
    return parallel, lambda: average_gradients(sharded, mesh["dp"])


@record  # torchrun prints the traceback of the first rank that fails
def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in DEFAULTS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value, help=f"{value!r}")
    parser.add_argument("--bfloat16", action="store_true", help="use autocast; routers still compute in float32")
    parser.add_argument("--data-parallel", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--expert-ranks", type=int, default=1, help="processes that share a layer's experts: 1")
    args, device = parser.parse_args(given), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=timedelta(minutes=2))
    rank, world = dist.get_rank(), dist.get_world_size()
    if args.batch % world or world % args.expert_ranks or 8 % args.expert_ranks:
        parser.error(f"{world} processes must divide --batch; --expert-ranks must divide them and the 8 experts")
    torch.manual_seed(0)  # all ranks must start with the same model
    model = GPT(args.dim, args.depth).to(device)
    mesh = init_device_mesh(device, (world // args.expert_ranks, args.expert_ranks), mesh_dim_names=("dp", "ep"))
    parallel, before_clipping = parallelize(model, mesh, args.data_parallel)
    by_mesh = {}  # a parameter group of a fused optimizer accepts only one mesh
    for parameter in model.parameters():
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters in by_mesh.values()], args.rate)
    done = load_checkpoint(args.out, model, optimizer)["step"] if list_checkpoints(args.out) else 0
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.tensor(list(b"".join(map(Path.read_bytes, files))), device=device)
    for step in range(done + 1, args.steps + 1):
        generator = torch.Generator().manual_seed(step)  # the batch does not depend on the number of ranks
        starts = torch.randint(len(text) - args.context, (args.batch, 1), generator=generator)[rank::world]
        windows = text[starts.to(device) + torch.arange(args.context + 1, device=device)]
        with torch.autocast(device, torch.bfloat16, enabled=args.bfloat16):
            logits, aux_loss = parallel(windows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        (loss + aux_loss).backward()
        before_clipping()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach() / world)
        if rank == 0 and (step % 10 == 0 or step == args.steps):
            print(f"step {step} of {args.steps}, {world} ranks: loss {loss.item():.4f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save_checkpoint(args.out, model, optimizer, step=step, extra={"step": step})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
