"""Inside the models of `transformers`: replace and upcycle feed-forward networks, train, save and load them."""

from mixture_of_experts.huggingface.adapters import ADAPTERS, Adapter
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward
from mixture_of_experts.huggingface.loading import from_pretrained
from mixture_of_experts.huggingface.losses import aux_loss
from mixture_of_experts.huggingface.replace import replace_ffn, upcycle

__all__ = [
    "ADAPTERS",
    "Adapter",
    "MoEFeedForward",
    "aux_loss",
    "from_pretrained",
    "replace_ffn",
    "upcycle",
]
