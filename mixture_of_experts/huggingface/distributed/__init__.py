"""Supports `DistributedConfig` in `transformers`: adds `MoE` layers to parallel plans, uses the device meshes, and
registers this package's token exchange."""

from mixture_of_experts.huggingface.distributed import ep_implementation as ep_implementation  # registers itself
