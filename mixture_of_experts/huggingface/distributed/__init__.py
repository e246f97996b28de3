"""Models with experts under the `DistributedConfig` of `transformers`: its meshes and plans, our exchange."""

from mixture_of_experts.huggingface.distributed import stock as stock  # registers itself
