"""The examples that make their own data run, and each mixture does what its example says."""

import ast
import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex

from mixture_of_experts import MoE, TopKGating, balance_experts
from mixture_of_experts.replay import replay_routing

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import expert_bias  # noqa: E402
import gpt  # noqa: E402
import gptq  # noqa: E402
import migrate  # noqa: E402
import muon  # noqa: E402
import older_choices  # noqa: E402
import provider  # noqa: E402
import routed_text  # noqa: E402
import train_gpu  # noqa: E402
import train_table  # noqa: E402
import train_vision  # noqa: E402


def test_a_table_of_two_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    """Few steps are enough to be better than a coin; both tasks share one module of experts."""
    train_table.main(["--steps", "60", "--rows", "500", "--experts", "4", "--k", "2"])
    described = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"(?:clicks|buys) ([\d.]+)%,?", described)]
    assert len(shares) >= 4
    assert min(shares[:4]) > 60
    first, second = train_table.MultiGate(8, 4, 2).mixtures.values()
    assert first.experts is second.experts
    assert first.gate is not second.gate


def test_a_vision_transformer_of_expert_choice(capsys: pytest.CaptureFixture[str]) -> None:
    train_vision.main(["--steps", "3", "--batch", "4"])
    described = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", described)]
    assert len(losses) == 3
    assert all(0 < loss < 9 for loss in losses)
    assert len(re.findall(r"of the patches went to no expert", described)) == 2
    image, digits = train_vision.pictures(200, torch.Generator().manual_seed(0))
    seen = {int(digit): (image[digits == digit] > 0.6).sum(dim=(1, 2)).float().mean() for digit in digits.unique()}
    assert len(seen) == 10
    assert seen[8] > seen[1] + 10  # more of its pixels are on


def test_gptq_has_a_smaller_error_than_rounding_to_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    gptq.main()
    nearest, calibrated = map(float, re.findall(r"([\d.]+) (?:rounded|by GPTQ)", capsys.readouterr().out))
    assert calibrated < 0.7 * nearest


def test_an_expert_bias_balances_favored_experts() -> None:
    """The figures of docs/balancing.md."""
    before, after = expert_bias.train(2e-3)
    assert before > 4.5
    assert after < 1.2
    assert expert_bias.train(None)[1] > 4.4


def test_choices_of_older_weights_are_those_of_a_copy():
    """Of the model some steps before. Weights are live; the balancing loss and the bias count the older choices."""
    losses = older_choices.main()
    assert losses[-1] < 0.8 * losses[0]
    moe = MoE(dim=32, gate=TopKGating(32, 8, expert_bias=True))
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
    balance_experts(moe, optimizer)
    older, seen, changed = [copy.deepcopy(moe)], [], []
    moe.gate.register_forward_hook(lambda gate, args, routing: seen.append(routing))
    for step, (batch, records) in enumerate(older_choices.with_older_choices(moe, torch.randn(6, 2, 16, 32), 3)):
        was, now = (model.gate(batch) for model in (older[max(step - 3, 0)], moe))
        with replay_routing(moe, records):
            out, aux_loss = moe(batch)
        routing = seen[-1]
        assert torch.equal(routing.expert, was.expert)
        probs = now.probs.gather(-1, was.expert.view(2, 16, 2))
        torch.testing.assert_close(routing.weight.view(2, 16, 2), probs / probs.sum(-1, keepdim=True))
        load = torch.stack([row.bincount(minlength=8) for row in was.expert])
        torch.testing.assert_close(routing.balance_loss, (load / 16 * now.probs.mean(1)).sum(-1).mean() * 8 / 2)
        (out.square().mean() + aux_loss).backward()
        assert torch.equal(moe.gate.expert_counts, load.sum(0))
        optimizer.step()
        optimizer.zero_grad()
        older.append(copy.deepcopy(moe))
        changed.append(not torch.equal(now.expert, was.expert))
    assert len(changed) == 6
    assert changed[-1]


def test_routers_of_another_library_are_tracked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixture_of_experts.providers.REGISTERED_PROVIDERS", {})
    provider.main()
    assert capsys.readouterr().out.split("\n")[:2] == ["('0.router', '1.router')", "1344"]


def test_migrated_layers_compute_what_megatron_and_tutel_do() -> None:
    """Their experts are written out here."""
    x, theirs = torch.randn(5, 32), {"router.weight": torch.randn(8, 32)}
    for i in range(8):
        theirs[f"experts.local_experts.{i}.linear_fc1.weight"] = torch.randn(2 * 64, 32)
        theirs[f"experts.local_experts.{i}.linear_fc2.weight"] = torch.randn(32, 64)
    weight, chosen = (x[0] @ theirs["router.weight"].T).topk(2)
    outputs = []
    for i in chosen.tolist():
        gate, up = (theirs[f"experts.local_experts.{i}.linear_fc1.weight"] @ x[0]).chunk(2)
        outputs.append(theirs[f"experts.local_experts.{i}.linear_fc2.weight"] @ (F.silu(gate) * up))
    expected = (weight.softmax(-1).unsqueeze(-1) * torch.stack(outputs)).sum(0)
    torch.testing.assert_close(migrate.from_megatron(theirs)(x[None])[0][0, 0], expected, rtol=1e-4, atol=1e-3)

    theirs = {"gates.0.wg.weight": torch.randn(8, 32)}
    theirs |= {f"experts.batched_fc{i}_w": torch.randn(8, 64, 32) for i in (1, 2)}
    theirs |= {"experts.batched_fc1_bias": torch.randn(8, 64), "experts.batched_fc2_bias": torch.randn(8, 32)}
    hidden = (x @ theirs["experts.batched_fc1_w"].mT + theirs["experts.batched_fc1_bias"][:, None]).relu()
    of_all = hidden @ theirs["experts.batched_fc2_w"] + theirs["experts.batched_fc2_bias"][:, None]
    best = (x @ theirs["gates.0.wg.weight"].T).softmax(-1).topk(2)
    weights = torch.zeros(5, 8).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    expected = torch.einsum("te,etd->td", weights, of_all)
    torch.testing.assert_close(migrate.from_tutel(theirs)(x[None])[0][0], expected, rtol=1e-4, atol=1e-2)


def test_weights_of_five_libraries_are_migrated(capsys: pytest.CaptureFixture[str]) -> None:
    migrate.main()
    described = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in described] == ["torchtitan", "Megatron", "DeepSpeed", "Tutel", "fairscale"]
    assert all(line.endswith("(1, 512, 32)") for line in described)
    gate = migrate.from_fairscale({"gate.wg.weight": torch.randn(32, 8)}, [torch.nn.Identity() for _ in range(8)]).gate
    assert gate(torch.randn(4, 64, 32)).capacity == 2 * 64 // 8


def test_a_step_of_muon_changes_every_matrix_alike(capsys: pytest.CaptureFixture[str]) -> None:
    muon.main()
    change = float(re.findall(r"of w1: ([\d.]+)", capsys.readouterr().out)[0])
    assert 0 < change < 3e-3  # AdamW would change them by at most this much


@pytest.mark.slow
def test_a_gpt_learns_and_writes(capsys: pytest.CaptureFixture[str]) -> None:
    """It begins at 8 bits a byte, which are 5.5 nats; the text that it writes begins as the library's does."""
    gpt.main(["--steps", "50", "--dim", "32", "--depth", "1", "--context", "32", "--batch", "4", "--rate", "0.02"])
    described = capsys.readouterr().out
    assert float(re.findall(r"step 50: loss ([\d.]+)", described)[0]) < 3.8
    assert described.split("\n", 1)[1].startswith('"""')
    model = gpt.GPT(32, 1).eval()
    text = torch.randint(256, (1, 12))
    later = torch.cat((text[:, :6], (text[:, 6:] + 1) % 256), dim=1)
    torch.testing.assert_close(model(text)[0][:, :6], model(later)[0][:, :6])  # it is causal
    assert not torch.allclose(model(text)[0][:, 6:], model(later)[0][:, 6:])


SIZES = dict(dim=32, depth=1, context=32, batch=2, seconds=0.4)
SMALL = ["--device", "cpu", "--eager", *(part for name, value in SIZES.items() for part in (f"--{name}", str(value)))]


@pytest.mark.slow
def test_the_example_for_a_gpu_trains_both_models_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    train_gpu.main(SMALL)
    described = capsys.readouterr().out
    of_dense, of_mixture = described.split("mixture:")
    for part in (of_dense, of_mixture):
        losses = [float(line.split()[-4]) for line in part.splitlines() if line.endswith("bits a byte")]
        assert len(losses) >= 2
        assert all(0 < loss < 9 for loss in losses)


def test_both_models_of_that_example_have_as_many_active_parameters() -> None:
    dense, mixture = train_gpu.Dense(64, 256), train_gpu.mixture(64, 256, experts=8, k=4)
    weights = sum(weight.numel() for weight in dense.parameters() if weight.ndim == 2)
    active = sum(weight.numel() for weight in mixture.experts.parameters()) * 4 // 8
    assert weights == active
    assert dense(torch.ones(1, 2, 64))[0].shape == mixture(torch.ones(1, 2, 64))[0].shape


DISTRIBUTED = ["--steps", "6", "--dim", "32", "--depth", "2", "--context", "32", "--batch", "8", "--save-every", "3"]


def train_distributed(folder: Path, *options: str, ranks: int) -> float:
    """The loss of the example's last step, in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(EXAMPLES / "train_distributed.py"), "--out", str(folder), *DISTRIBUTED, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (loss,) = re.findall(rf"of \d, {ranks} ranks: loss (\S+)", done.stdout)
    return float(loss)


@pytest.mark.slow
def test_distributed_layouts_train_as_one_process_does(tmp_path: Path) -> None:
    """Also in half precision, and continued on other ranks in another layout."""
    alone = train_distributed(tmp_path / "alone", ranks=1)
    assert 4 < alone < 5.3
    for style in ("ddp", "fsdp2"):
        for ranks, expert_ranks in ((2, 1), (4, 2)):
            layout = ["--data-parallel", style, "--expert-ranks", str(expert_ranks)]
            loss = train_distributed(tmp_path / f"{style}-{ranks}", *layout, ranks=ranks)
            assert abs(loss - alone) < 2e-4, layout
    assert abs(train_distributed(tmp_path / "bfloat16", "--bfloat16", ranks=1) - alone) < 0.05
    half = ["--steps", "3", "--data-parallel", "fsdp2", "--expert-ranks", "2"]
    train_distributed(tmp_path / "resumed", *half, ranks=2)
    assert abs(train_distributed(tmp_path / "resumed", ranks=1) - alone) < 2e-4


def import_example(path: Path) -> set[str]:
    """What a file imports, by the first part of its name."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_text_colored_by_expert() -> None:
    """Of two experts with a slot each; the third token finds both taken."""
    gate = TopKGating(2, 2, capacity_factor_train=1e-3, min_expert_capacity=1, priority="score")
    torch.nn.init.eye_(gate.w_gating)
    routing = gate(torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]]]))
    figure = routed_text.draw_text(["a\n", "$b", "\x1b"], routing)
    places = [(text.get_text(), *text.get_position()) for text in figure.axes[0].texts]
    assert places == [("a", 0.5, 0.5), ("·", 1.5, 0.5), ("$", 0.5, 1.5), ("b", 1.5, 1.5), ("·", 2.5, 1.5)]
    colours = [to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches]
    assert colours == [to_hex(colour) for colour in ("C0", "C0", "C1", "C1", "white")]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_self_contained(path: Path) -> None:
    """It is copied by itself, or beside one that is made to be imported; the list of examples has it."""
    assert len(path.read_text(encoding="utf-8").splitlines()) < 120
    here = {place.stem for place in EXAMPLES.iterdir()} - {"checkpoints", "gpt", "routed_text"}
    assert not import_example(path) & here
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
