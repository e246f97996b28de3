"""Models with experts under `DistributedConfig` of transformers; `support/engines.py` has a command for all cells."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from support import engines, engines_trainers
from support.parallel_workers import Workers
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from mixture_of_experts.huggingface.distributed.parallel_style import EXPERTS_STYLE, ShardedExpertsParallel
from mixture_of_experts.huggingface.distributed.plans import update_parallel_plans


@pytest.mark.slow
def test_models_are_those_of_one_process(workers: Workers, tmp_path: Path):
    """One start of two processes for all: torch keeps meshes of process groups that ended."""
    engines.save_models(
        tmp_path, [engines.FIRST_CELLS, *engines.OTHER_CELLS, *engines.STOCK_CELLS, *engines.RANDOM_CELLS]
    )
    engines.build_model(engines.Cell(), num_experts=3).save_pretrained(tmp_path / "three")
    engines_trainers.build_model().save_pretrained(tmp_path / "trainers")
    workers.run(engines_trainers.check_all, 2, tmp_path)


def test_plans_know_of_layers_with_experts():
    model = engines.build_model(engines.Cell())
    update_parallel_plans(model)
    attention = {f"model.layers.*.self_attn.{name}_proj" for name in "qkvo"}
    assert set(model.tp_plan) == {"model.embed_tokens", *attention, "lm_head"}
    ((rule, style),) = model.ep_plan.items()
    assert rule == "model.layers.*.mlp.moe.experts"
    assert str(style) == "mixture_of_experts"


def test_style_name_is_accepted_by_transformers():
    for name in (EXPERTS_STYLE, copy.deepcopy(EXPERTS_STYLE), pickle.loads(pickle.dumps(EXPERTS_STYLE))):
        assert "ep_dispatch_experts" in [name]
        assert name == "ep_dispatch_experts"
        assert name not in ("colwise", None)
        assert type(ALL_PARALLEL_STYLES[name]) is ShardedExpertsParallel
    assert type(ALL_PARALLEL_STYLES["ep_dispatch_experts"]) is EpDispatchExpertsParallel


def test_parallel_plans_drop_replaced_rules():
    """A rule names all layers: half of a network's rules would cut half of its matrices."""
    model = engines.build_model(engines.CELLS["one layer of two"])
    assert "model.layers.*.mlp.up_proj" in model.tp_plan
    update_parallel_plans(model)
    assert not any("mlp" in rule for rule in model.tp_plan)
