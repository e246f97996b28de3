"""Record what the published mixture-of-experts 0.2.3 computes, for `tests/test_published.py`.

That package has our import name, so it is installed into a folder of its own and this file is run with it alone:

    pip install --no-deps --target /tmp/published mixture-of-experts==0.2.3
    PYTHONPATH=/tmp/published:tests python tests/support/record_published.py
"""

from importlib.metadata import version
from pathlib import Path

import torch

import mixture_of_experts  # the published one
from support.published import OPTIONS

FOLDER = Path(__file__).parents[1] / "published"


def record(kind: str, num_experts, options: dict, training: bool) -> dict:
    """One forward and backward of `sum(out * cotangent) + loss` from fixed seeds."""
    torch.manual_seed(0)
    # its uniforms have the dtype of the layer, ours are float32: where they matter the layer is float32
    dtype = torch.double if options.get("second_policy_train") in ("all", "none") else torch.float
    layer = getattr(mixture_of_experts, kind)(6, num_experts, **options).to(dtype).train(training)
    x = torch.randn(2, 24, 6, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(2, 24, 6, dtype=dtype)
    torch.manual_seed(1)
    out, loss = layer(x)
    ((out * cotangent).sum() + loss).backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    state = {name: value.detach() for name, value in layer.state_dict().items()}
    return dict(
        state=state, x=x.detach(), cotangent=cotangent, out=out.detach(), loss=loss.detach(), grad_x=x.grad, grads=grads
    )


if __name__ == "__main__":
    assert version("mixture-of-experts") == "0.2.3", "run this with the published package alone, see above"
    cases = {
        f"{name}_{mode}": record(*case, training=mode == "train")
        for name, case in OPTIONS.items()
        for mode in ("train", "eval")
    }
    torch.save(cases, FOLDER / "cases.pt")
    for kind, num_experts in (("MoE", 2), ("HeirarchicalMoE", (2, 2))):  # modules, not their states
        torch.save(getattr(mixture_of_experts, kind)(2, num_experts, 2), FOLDER / f"{kind}.pt")
    print(f"recorded {len(cases)} cases")
