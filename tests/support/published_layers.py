"""The layers that are recorded: name, experts and options of each.

`tests/support/record_published.py` of commit 7c862a9 recorded them with mixture-of-experts 0.2.3 alone.
"""

from torch import nn

OPTIONS = {
    "moe_all": ("MoE", 4, dict(second_policy_train="all", second_policy_eval="all")),
    "moe_none": ("MoE", 4, dict(second_policy_train="none", second_policy_eval="none")),
    "moe_random": ("MoE", 4, dict(second_threshold_train=0.6, second_threshold_eval=0.6)),
    "moe_drops": ("MoE", 3, dict(second_policy_train="all", capacity_factor_train=0.7, capacity_factor_eval=0.9)),
    "moe_few_tokens": ("MoE", 16, {}),
    "moe_gelu": ("MoE", 4, dict(activation=nn.GELU, hidden_dim=12, loss_coef=0.1)),
    "hierarchy_all": ("HeirarchicalMoE", (2, 3), dict(second_policy_train="all", second_policy_eval="all")),
    "hierarchy_random": ("HeirarchicalMoE", (3, 2), dict(second_threshold_train=0.6, second_threshold_eval=0.6)),
}
