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

from mixture_of_experts.huggingface.distributed.plans import plan_experts
from mixture_of_experts.huggingface.distributed.style import STYLE, SpreadsExperts


@pytest.mark.slow
def test_models_are_those_of_one_process(workers: Workers, tmp_path: Path):
    """One start of two processes for all: torch keeps meshes of process groups that ended."""
    engines.save_models(tmp_path, [engines.FIRST, *engines.OTHERS, *engines.STOCK, *engines.RANDOM])
    engines.build(engines.Cell(), num_experts=3).save_pretrained(tmp_path / "three")
    engines_trainers.build().save_pretrained(tmp_path / "trainers")
    workers.run(engines_trainers.check_all, 2, tmp_path)


def test_plans_know_of_layers_with_experts():
    model = engines.build(engines.Cell())
    plan_experts(model)
    attention = {f"model.layers.*.self_attn.{name}_proj" for name in "qkvo"}
    assert set(model.tp_plan) == {"model.embed_tokens", *attention, "lm_head"}
    ((rule, style),) = model.ep_plan.items()
    assert rule == "model.layers.*.mlp.moe.experts"
    assert str(style) == "mixture_of_experts"


def test_the_name_of_the_style_is_its_own_and_found_where_transformers_tests_for_theirs():
    for name in (STYLE, copy.deepcopy(STYLE), pickle.loads(pickle.dumps(STYLE))):
        assert "ep_dispatch_experts" in [name]
        assert name == "ep_dispatch_experts"
        assert name not in ("colwise", None)
        assert type(ALL_PARALLEL_STYLES[name]) is SpreadsExperts
    assert type(ALL_PARALLEL_STYLES["ep_dispatch_experts"]) is EpDispatchExpertsParallel


def test_plans_leave_no_rule_of_a_network_that_stands_beside_experts():
    """A rule names all layers: half of a network's rules would cut half of its matrices."""
    model = engines.build(engines.CELLS["one layer of two"])
    assert "model.layers.*.mlp.up_proj" in model.tp_plan
    plan_experts(model)
    assert not any("mlp" in rule for rule in model.tp_plan)
