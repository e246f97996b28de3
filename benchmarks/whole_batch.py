"""The layer by hand for one configuration: all slots at once, in memory that stands ready.

e experts, s slots of each, r = e s rows, t tokens, a = t k assignments, d model dim, h hidden dim
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contest import Contestant
from benchmarks.layer import loaded
from benchmarks.problem import Inputs, Weights
from mixture_of_experts.dispatch import Plan, plan
from mixture_of_experts.routing import Routing

aten = torch.ops.aten


def whole_batch(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The roofline, and all that it leaves out and a layer cannot.

    The gate is this package's. New memory are the output, the gradients and the product that is kept for the backward;
    a layer of a model cannot have the latter before, as every layer keeps its own until its backward.
    """
    module = loaded(case, weights, inputs).train()
    w1, w2 = module.experts.w1, module.experts.w2
    e, s, d = case.e, case.rows_per_expert, case.d
    x, grad = inputs.x.detach().requires_grad_(), inputs.grad.reshape(-1, d)
    tokens, one = x.detach().view(-1, d), torch.ones(())
    slots, grad_slots = (tokens.new_empty(e * s, d) for _ in range(2))
    out = tokens.new_zeros(e * s + 1, d)  # its last row is of the choices that were dropped
    hidden, grad_hidden = (tokens.new_empty(e, s, case.h) for _ in range(2))

    def experts(rows: Tensor) -> Tensor:
        return rows[: e * s].view(e, s, -1)

    def collect(where: Plan) -> Tensor:
        table, weight = (t.detach().view(-1, case.k) for t in (where.row, where.weight))
        return F.embedding_bag(table, out, per_sample_weights=weight, mode="sum").view_as(x)

    def forward() -> tuple[Routing, Plan, Tensor, Tensor]:
        routing = module.gate(x)
        where = plan(routing)
        with torch.no_grad():
            torch.index_select(tokens, 0, where.token.clamp_(max=len(tokens) - 1), out=slots)
            pre = torch.bmm(experts(slots), w1)
            aten.gelu.out(pre, out=hidden)
            torch.bmm(hidden, w2, out=experts(out))
            return routing, where, pre, collect(where)

    def step() -> None:
        routing, where, pre, _ = forward()
        with torch.no_grad():
            row_weight = where.row_weight().unsqueeze(-1)
            torch.index_select(grad, 0, where.token, out=grad_slots)
            torch.bmm(experts(grad_slots), w2.mT, out=grad_hidden)
            aten.gelu.out(pre, out=hidden)
            w2.grad = torch.bmm(hidden.mT, experts(grad_slots.mul_(row_weight)))
            grad_weight = F.pad(hidden.mul_(grad_hidden).sum(dim=-1).flatten(), (0, 1))[where.row]
            aten.gelu_backward.grad_input(grad_hidden, pre, grad_input=grad_hidden)
            w1.grad = torch.bmm(experts(slots.mul_(row_weight)).mT, grad_hidden)
            torch.bmm(grad_hidden, w1.mT, out=experts(out))
            x.grad = collect(where)
        aux = module.aux_loss([routing])
        torch.autograd.backward((routing.weight, aux), (grad_weight.view_as(routing.weight), one))

    note = f"the layer by hand on {e} x {s} x {d} slots, into buffers that stand ready; this package's gate"
    parameters = list(module.parameters())
    return Contestant("whole batch", step, case, lambda: forward()[-1], [x], parameters, note)
