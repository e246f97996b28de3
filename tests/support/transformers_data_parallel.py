"""Two processes train a swapped model under DDP: `python -m support.transformers_data_parallel RESULTS` in `tests`."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mixture_of_experts.huggingface import replace_ffn
from support.transformers_models import ARCHITECTURES, ONE_PLACE, two_lengths, without_dropout


def build(name: str, gate=ONE_PLACE, **settings) -> nn.Module:
    model = without_dropout(ARCHITECTURES[name].build(**settings)).train()
    replace_ffn(model, num_experts=4, gate=gate, loss_coef=0.5)
    return model


def labelled() -> dict[str, Tensor]:
    _, batch = two_lengths("right")
    return {**batch, "labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worker(rank: int, results: str) -> None:
    rendezvous = f"file://{results}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model, batch = build("llama"), labelled()
    model.activation_checkpointing_enable()
    wrapped = DistributedDataParallel(model)
    part = {name: value[rank : rank + 1] for name, value in batch.items()}
    torch.save(gradients(model, wrapped(**part).loss), f"{results}/{rank}.pt")
    # the group must not die with the reducer: torch holds Python's lock there while it waits for gloo's threads, and
    # they need it to drop what checkpointing left on their last reduction
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    # forked: the imports are made once, and nothing has been computed that a fork could not survive
    mp.start_processes(worker, args=(sys.argv[1],), nprocs=2, start_method="fork")
