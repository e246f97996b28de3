"""Train with expert parallelism and FSDP2 in Lightning, using `ModelParallelStrategy`. Needs lightning.

python examples/lightning_experts.py --devices 2 --expert-ranks 2  # two CPU processes or two GPUs
"""

import argparse

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mixture_of_experts import recipes
from mixture_of_experts.parallel import ExpertParallel, clip_grad_norm_, fully_shard_experts, parallelize_module


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.ffn = nn.RMSNorm(dim), recipes.mixtral(dim, num_experts=8, hidden_dim=dim, layers=2)

    def forward(self, x):
        out, aux_loss = self.ffn(self.norm(x))
        return x + out, aux_loss


class Model(nn.Module):
    def __init__(self, dim=32, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x):
        total = x.new_zeros(())
        for layer in self.layers:
            x, aux_loss = layer(x)
            total = total + aux_loss
        return x, total


def build():
    torch.manual_seed(0)  # the same weights on every rank
    return Model()


def loss_of(out):
    return (out - 1).square().mean()  # your loss here


class Mixture(lightning.LightningModule):
    expert_ranks = 1  # ranks that share a layer's experts; other ranks hold replicas

    def configure_model(self):
        if hasattr(self, "model"):  # Lightning may call this method again
            return
        self.model, world = build(), self.trainer.world_size
        sizes = (world // self.expert_ranks, self.expert_ranks)
        mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=("dp", "ep"))
        everyone = mesh["dp", "ep"]._flatten("batch")
        parallelize_module(self.model, mesh["ep"], {"layers.*.ffn": ExpertParallel(batch_group=everyone)})
        for layer in self.model.layers:
            fully_shard_experts(layer.ffn, mesh=mesh["dp"])
            fully_shard(layer, mesh=everyone)
        fully_shard(self.model, mesh=everyone)

    def training_step(self, batch):
        out, aux_loss = self.model(batch)
        return loss_of(out) + aux_loss

    def configure_optimizers(self):
        by_mesh = {}
        for parameter in self.parameters():
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        return torch.optim.AdamW([{"params": parameters} for parameters in by_mesh.values()], lr=1e-2, weight_decay=0.1)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.log("norm", clip_grad_norm_(self.model.parameters(), gradient_clip_val))


def make_trainer(devices, nodes=1, one_file=False, **options):
    strategy = ModelParallelStrategy(
        data_parallel_size=devices * nodes, tensor_parallel_size=1, save_distributed_checkpoint=not one_file
    )
    return lightning.Trainer(devices=devices, num_nodes=nodes, strategy=strategy, gradient_clip_val=1.0, **options)


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"devices": 1, "expert-ranks": 1, "epochs": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(given)
    module = Mixture()
    module.expert_ranks = args.expert_ranks
    loader = torch.utils.data.DataLoader(torch.randn(64, 16, 32), batch_size=4)
    trainer = make_trainer(args.devices, max_epochs=args.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)


if __name__ == "__main__":
    main()
