"""Models with experts under the `DistributedConfig` of `transformers`: its meshes and plans, our exchange."""

from mixture_of_experts.huggingface.distributed import ep_implementation as ep_implementation  # registers itself
