"""Checks the installed package: `check_installed.py VERSION ENVIRONMENT`, run with that environment's Python."""

import sys
from importlib.metadata import requires
from importlib.resources import files
from pathlib import Path

import torch

import mixture_of_experts
from mixture_of_experts import HeirarchicalMoE, MoE

version, environment = sys.argv[1:]

# The name once belonged to another package, 0.2.3: be sure of what was imported, and from where.
assert mixture_of_experts.__version__ == version != "0.2.3", mixture_of_experts.__version__
location = Path(mixture_of_experts.__file__).resolve()
assert location.is_relative_to(Path(environment).resolve()), location
assert files("mixture_of_experts").joinpath("py.typed").is_file()

runtime = {need.split(">")[0] for need in requires("mixture_of_experts") or [] if "extra ==" not in need}
assert runtime == {"torch", "einops"}, runtime
optional = {"matplotlib", "tqdm", "transformers", "mixture_of_experts.parallel", "mixture_of_experts.huggingface"}
assert not optional & set(sys.modules), optional & set(sys.modules)

for layer in (MoE(dim=16, num_experts=4), HeirarchicalMoE(dim=16, num_experts=(2, 2))):
    out, aux_loss = layer(torch.randn(2, 8, 16))
    (out.square().sum() + aux_loss).backward()
    assert out.shape == (2, 8, 16)
print(f"mixture_of_experts {version} from {location.parent}")
