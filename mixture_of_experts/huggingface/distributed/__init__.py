"""Models with experts under the `DistributedConfig` of `transformers`: its meshes and plans, with the exchange of this
package."""

from mixture_of_experts.huggingface.distributed import ep_implementation as ep_implementation  # registers itself
