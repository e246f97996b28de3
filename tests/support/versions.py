"""What older versions of torch that the package runs on cannot do."""

import torch
from torch.torch_version import TorchVersion

TORCH = TorchVersion(torch.__version__)
SHARDS_LISTS = TorchVersion("2.12") <= TORCH  # `fully_shard` on an `nn.ModuleList` that has a forward
ONE_DYNAMIC_GRAPH = TorchVersion("2.13") <= TORCH  # `torch.compile(dynamic=True)` keeps all lengths open at once
