"""Adds mixture-of-experts layers to `transformers` models by replacing or upcycling feed-forward networks, and supports
training, saving and loading the modified models."""

from mixture_of_experts.huggingface.blocks.backend import experts_forward
from mixture_of_experts.huggingface.blocks.model_conversion import from_transformers, to_transformers
from mixture_of_experts.huggingface.callback import BalanceCallback, RoutingCallback, log_routing
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward
from mixture_of_experts.huggingface.grpo import ReplayRouting
from mixture_of_experts.huggingface.lora import fast_lora, weights_shown
from mixture_of_experts.huggingface.lora.saving import save_adapter
from mixture_of_experts.huggingface.model_watch import aux_loss
from mixture_of_experts.huggingface.prefetching import prefetch_experts
from mixture_of_experts.huggingface.pruning.prune import expert_scores, prune
from mixture_of_experts.huggingface.replacement.dense_ffn import Adapter
from mixture_of_experts.huggingface.replacement.replace import replace_ffn, upcycle
from mixture_of_experts.huggingface.saving.exporting import export
from mixture_of_experts.huggingface.saving.loader import ExpertsLoader, from_pretrained

__all__ = [
    "Adapter",
    "BalanceCallback",
    "ExpertsLoader",
    "MoEFeedForward",
    "ReplayRouting",
    "RoutingCallback",
    "aux_loss",
    "expert_scores",
    "experts_forward",
    "export",
    "fast_lora",
    "from_pretrained",
    "from_transformers",
    "log_routing",
    "prefetch_experts",
    "prune",
    "replace_ffn",
    "save_adapter",
    "to_transformers",
    "upcycle",
    "weights_shown",
]
