"""Models with experts under the `DistributedConfig` of `transformers`, with its meshes and plans, and this package's
exchange."""

from mixture_of_experts.huggingface.distributed import ep_implementation as ep_implementation  # registers itself
