"""Why a mixture does not collapse: Chen et al. 2022 (arXiv 2208.02813) repeated with this package's layer.

    python -m experiments.clustered_patches                 # both settings, three seeds: some minutes
    python -m experiments.clustered_patches --seeds 0       # one seed

A sample has four patches in random order: its label's sign times the feature of its cluster, the centre of its
cluster, the feature of another cluster with a random sign, and noise. One network cannot tell the two features apart.
In a mixture the router has to find the clusters, from nothing but the loss of the labels. Experts are networks of
cubic ("nonlinear") or linear filters. The table has the accuracy on new samples, and the entropy of the cluster given
the expert: 0 where every expert has samples of one cluster only, log 4 = 1.39 where the router knows nothing of them.
The picture shows which expert took which cluster.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no screen

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mixture_of_experts import MoE
from mixture_of_experts.gating import Choices, TokenChoiceGate, Tokens

from .language_model.report import format_rows

CLUSTERS, PATCHES, FEATURES, EXPERTS, FILTERS = 4, 4, 50, 8, 16
SCALE = 10.0  # of all inputs, as in the authors' code: the learning rates below are theirs
NOISE = {1: 1.0, 2: 2.0}  # standard deviation of the noise patch, over the root of its length, in the two settings
MODELS = {
    "one linear network": (False, 1),
    "one nonlinear network": (False, 3),
    "mixture of linear experts": (True, 1),
    "mixture of nonlinear experts": (True, 3),
}
PUBLISHED = {  # accuracy in percent, of settings 1 and 2
    "mixture of linear experts": ("93.0 ± 2.1", "89.5 ± 1.4"),
    "mixture of nonlinear experts": ("99.5 ± 0.6", "98.1 ± 1.6"),
}


class Samples(NamedTuple):
    """x (n, 4 · 50), label (n,) of ±1, cluster (n,) int64."""

    x: Tensor
    label: Tensor
    cluster: Tensor


def draw_samples(directions: Tensor, noise: float, count: int, generator: torch.Generator) -> Samples:
    """New samples; `directions` (2, clusters, 50) are the orthonormal features and centres."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    def signs() -> Tensor:
        return 2.0 * torch.randint(2, (count, 1), generator=generator) - 1

    features, centres = directions
    label = signs()
    cluster = torch.randint(CLUSTERS, (count,), generator=generator)
    other = (cluster + torch.randint(1, CLUSTERS, (count,), generator=generator)) % CLUSTERS
    patches = torch.stack(
        [
            label * uniform(0.5, 2) * features[cluster],
            uniform(1, 2) * centres[cluster],
            signs() * uniform(0.5, 3) * features[other],
            noise / math.sqrt(FEATURES) * torch.randn(count, FEATURES, generator=generator),
        ],
        dim=1,
    )
    order = torch.rand(count, PATCHES, generator=generator).argsort(dim=1)
    patches = patches.gather(1, order[..., None].expand_as(patches))
    return Samples(SCALE * patches.flatten(1), label.squeeze(1), cluster)


class PatchNetwork(nn.Module):
    """The sum over filters and patches of (filter · patch) to a power, as the first of as many outputs as inputs."""

    def __init__(self, filters: int, power: int, scale: float):
        super().__init__()
        self.power = power
        self.weight = nn.Parameter(torch.empty(FEATURES, filters).uniform_(-1, 1) * scale / math.sqrt(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        response = x.unflatten(-1, (PATCHES, FEATURES)) @ self.weight
        return F.pad(response.pow(self.power).sum(dim=(-2, -1)).unsqueeze(-1), (0, x.shape[-1] - 1))


class NoisyPatchGate(TokenChoiceGate):
    """The paper's router: the expert of the largest logit plus uniform noise. All logits begin at 0.

    The same weights read every patch. Logit plus noise is also the weight of the expert's output, as in the authors'
    code (in the paper it is the softmax). There is no balancing loss.
    """

    def __init__(self) -> None:
        super().__init__(PATCHES * FEATURES, EXPERTS, k=1)
        self.weight = nn.Parameter(torch.zeros(FEATURES, EXPERTS))

    def decide(self, tokens: Tokens) -> Choices:
        logits = self.product(tokens.x.unflatten(-1, (PATCHES, FEATURES)).sum(dim=-2), self.weight)
        weight, expert = (logits + torch.rand_like(logits)).max(dim=-1, keepdim=True)
        return Choices(expert, weight=weight, probs=logits.softmax(dim=-1), losses={})


def make_mixture(power: int) -> MoE:
    experts = [PatchNetwork(FILTERS, power, scale=1e-3) for _ in range(EXPERTS)]
    return MoE(PATCHES * FEATURES, EXPERTS, gate=NoisyPatchGate(), experts=experts)


def scores(model: nn.Module, samples: Samples) -> Tensor:
    """(n,): what the model says of every sample; its sign is the predicted label."""
    out = model(samples.x[None])
    return (out[0] if isinstance(out, tuple) else out)[0, :, 0]


def train(model: MoE | PatchNetwork, samples: Samples, steps: int) -> None:
    """Gradient descent on all samples at once, as the authors do it for each kind of model."""
    adam = None
    if isinstance(model, PatchNetwork):
        adam = torch.optim.Adam(model.parameters(), 0.003 if model.power == 1 else 0.01, weight_decay=5e-4)
        steps *= 4  # the authors train one network for 800
    for _ in range(steps):
        loss = F.softplus(-samples.label * scores(model, samples)).mean()
        model.zero_grad()
        loss.backward()
        if adam:
            adam.step()
        else:
            descend(model)


@torch.no_grad()
def descend(moe: nn.Module) -> None:
    """A step of gradient descent for the router, and of a fixed length for each expert."""
    for network in moe.experts:
        network.weight -= 1e-3 * network.weight.grad / (network.weight.grad.norm() + 1e-30)
    moe.gate.weight -= 0.1 * moe.gate.weight.grad


@torch.no_grad()
def examine(model: nn.Module, samples: Samples) -> dict[str, Any]:
    """Accuracy, and of a mixture how many samples of each cluster every expert got, with the entropy of that."""
    result: dict[str, Any] = {"accuracy": (scores(model, samples) * samples.label > 0).double().mean().item()}
    if isinstance(model, MoE):
        expert = model.gate(samples.x[None]).expert[0]
        counts = torch.zeros(EXPERTS, CLUSTERS, dtype=torch.float64)
        counts.index_put_((expert, samples.cluster), torch.ones((), dtype=torch.float64), accumulate=True)
        share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        entropy = torch.special.entr(share).sum(dim=1) @ counts.sum(dim=1) / counts.sum()
        result |= {"entropy": entropy.item(), "counts": counts.long().tolist()}
    return result


def run(name: str, setting: int, seed: int, count: int, steps: int) -> dict[str, Any]:
    """Train a model of `MODELS` on samples of a seed and examine it on new ones."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(FEATURES, 2 * CLUSTERS, generator=generator)).Q
    directions = basis.T.reshape(2, CLUSTERS, FEATURES)
    training, new = (draw_samples(directions, NOISE[setting], count, generator) for _ in range(2))
    torch.manual_seed(seed)
    mixture, power = MODELS[name]
    model = make_mixture(power) if mixture else PatchNetwork(EXPERTS * FILTERS, power, scale=1.0)
    train(model, training, steps)
    return {"model": name, "setting": setting, "seed": seed, **examine(model, new)}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean and deviation over the seeds, a line for each model and setting."""
    rows: list[tuple[str, ...]] = [("model", "setting", "accuracy, %", "published", "entropy")]
    for setting in NOISE:
        for name in MODELS:
            own = [result for result in results if (result["model"], result["setting"]) == (name, setting)]
            accuracy = spread([100 * result["accuracy"] for result in own], 1)
            entropy = spread([result["entropy"] for result in own], 2) if "entropy" in own[0] else ""
            rows.append((name, str(setting), accuracy, PUBLISHED.get(name, ("", ""))[setting - 1], entropy))
    return format_rows(rows)


def spread(values: Sequence[float], digits: int) -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Which expert took which cluster: a panel for each mixture and setting, of its first seed."""
    first = [result for result in results if "counts" in result and result["seed"] == results[0]["seed"]]
    figure, all_axes = plt.subplots(1, len(first), figsize=(3.2 * len(first), 3.6), layout="constrained", sharey=True)
    for axes, result in zip(all_axes, first, strict=True):
        counts = torch.tensor(result["counts"], dtype=torch.float64)
        share = counts / counts.sum(dim=0)  # of each cluster
        axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (expert, cluster), value in np.ndenumerate(share.numpy()):
            if value >= 0.005:
                colour = "white" if value > 0.5 else "black"
                axes.text(cluster, expert, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
        title = f"{result['model']}\nsetting {result['setting']}: {result['accuracy']:.1%} right"
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(CLUSTERS), [str(i + 1) for i in range(CLUSTERS)])
        axes.set_yticks(range(EXPERTS), [str(i + 1) for i in range(EXPERTS)])
        axes.set_xlabel("cluster")
    all_axes[0].set_ylabel("expert: its share of each cluster, %")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    runs = list(product(MODELS, NOISE, args.seeds))
    results = [run(*which, args.samples, args.steps) for which in tqdm(runs, unit="run")]
    print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "clustered_patches.json").write_text(json.dumps(results, indent=2))
    draw(results, args.out / "clustered_patches.png")
    print(f"wrote clustered_patches.json and clustered_patches.png to {args.out}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of data and initial parameters")
    parser.add_argument("--samples", type=int, default=16_000, help="to train on, and as many to examine")
    parser.add_argument("--steps", type=int, default=200, help="of gradient descent")
    parser.add_argument("--out", type=Path, default=Path("runs/clustered_patches"), help="folder of table and picture")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
