"""Swapped models of transformers whose experts are spread over ranks, and saved."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mixture_of_experts.huggingface import from_pretrained, replace_ffn
from mixture_of_experts.parallel import ExpertParallel, parallelize_module
from support.parallel_checks import make_mesh
from support.transformers_models import ARCHITECTURES


def check_saved_model_is_whole(folder: Path) -> None:
    """With the whole state, which ranks gather; also of the model without its head, and a copy."""
    torch.set_default_dtype(torch.float32)
    model = ARCHITECTURES["llama"].build()
    names = replace_ffn(model, num_experts=4)
    whole = copy.deepcopy(model).state_dict()
    parallelize_module(model, make_mesh()["ep"], {f"{name}.moe": ExpertParallel() for name in names})
    for saved, place in ((model, "all"), (copy.deepcopy(model), "copy"), (model.model, "body")):
        state = get_model_state_dict(saved, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        saved.save_pretrained(folder / place, state_dict=state, is_main_process=dist.get_rank() == 0)
        dist.barrier()
        found = from_pretrained(folder / place).state_dict()
        assert len(found) > 10
        for name, value in found.items():
            assert torch.equal(value, whole[name if place != "body" else f"model.{name}"]), name
