"""Integrates layers with experts into the `DistributedConfig` of `transformers`: its meshes, its parallel plans, and
this package's token exchange."""

from mixture_of_experts.huggingface.distributed import ep_implementation as ep_implementation  # registers itself
