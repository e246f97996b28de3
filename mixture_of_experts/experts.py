"""Defines expert networks with stacked weights, lists of expert modules, and the two interfaces that experts can
implement.

Axes: e (experts, one or two dimensions, `*e`), t (tokens), s (slots per expert), r (rows sorted by expert), d (model
dimension), h (hidden dimension), o (output dimension).

1. *Slots*, supported by any module: `experts(slots)` maps `(*e, s, d)` to the same shape.
2. *Tokens*, supported by `RoutedExperts`: `experts(x, assignments)` maps all tokens of a call, `(t, d)`, to `(t, o)`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.dispatch.permutation import (
    Permutation,
    permute_to_slots,
    permute_with_padding,
    permute_without_gaps,
)
from mixture_of_experts.dispatch.rows import combine, dispatch
from mixture_of_experts.ops import routed_ffn
from mixture_of_experts.ops.activations import (
    ActivationLike,
    make_activation,
    takes_gate_and_up,
    unknown_activation_reason,
)
from mixture_of_experts.ops.grouped import grouped_matmul
from mixture_of_experts.ops.network import Network, cast_operands
from mixture_of_experts.ops.plain import feed_forward
from mixture_of_experts.support.batch_invariance import reject_batch_invariance
from mixture_of_experts.support.checked_module import FixedShapeModule, checked_setting
from mixture_of_experts.support.checks import (
    check_devices,
    check_dtype,
    check_flag,
    check_number,
    check_result,
    check_size,
    check_sizes,
    describe_shape,
)
from mixture_of_experts.support.private_torch import get_wrapped_module, unsafe_view, unwrap_module
from mixture_of_experts.support.subclassing import is_package_class
from mixture_of_experts.support.tracing import has_data, is_host_readable

DIM_OUT_HINT = ". If the experts change the width of tokens, set their dim_out to the width of the outputs"
MAX_SLOTS_PER_CHOICE = 4  # maximum number of slots per choice without a warning


class RoutedExperts(nn.Module):
    """Base class for experts that receive all tokens of a call and their `Assignments`.

    Subclasses implement `compute`, which receives rows sorted by expert and returns one output row per input row. There
    is no padding between the rows of consecutive experts, and outputs beyond the last expert's rows are ignored. If the
    output width differs from the input width, set the `dim_out` attribute. The base class handles dispatching,
    combining, expert capacity and two-level gating. A subclass whose `forward` has no `assignments` argument receives
    slots instead, like any other module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mixture_of_experts import MoE
        >>> from mixture_of_experts.ops import grouped_matmul
        >>> class LinearExperts(RoutedExperts):
        ...     def __init__(self, dim, num_experts):
        ...         super().__init__()
        ...         self.num_experts = num_experts
        ...         self.weight = nn.Parameter(torch.randn(num_experts, dim, dim) * dim**-0.5)
        ...
        ...     def compute(self, rows, num_tokens_per_expert):
        ...         return grouped_matmul(rows, self.weight, num_tokens_per_expert)
        >>> moe = MoE(dim=16, num_experts=4, experts=LinearExperts(16, 4), capacity_factor_train=None)
        >>> moe(torch.randn(2, 10, 16))[0].shape
        torch.Size([2, 10, 16])
    """

    reads_assignments: ClassVar[bool] = True
    #: whether outputs never share memory with the tokens; True for this package's classes
    allocates_outputs: ClassVar[bool] = True
    _version: int = 2  # torch stores this version in state dicts; it was 1 in mixture-of-experts 0.2.3

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.reads_assignments = binds_assignments(cls.forward)
        cls.allocates_outputs = is_package_class(next(base for base in cls.__mro__ if "forward" in base.__dict__))

    def variant_reason(self) -> str | None:
        """Return the reason why outputs may depend on the batch even under `ops.use("batch_invariant")`, or None if
        they are independent of the batch."""
        return f"{type(self).__name__} implements its own computation of rows; use Experts or GatedExperts"

    def forward(self, x: Tensor, assignments: Assignments | None = None) -> Tensor:
        """Map tokens `(t, d)` to `(t, o)` if assignments are passed, otherwise slots `(*e, s, d)` to `(*e, s, o)`."""
        if assignments is None:
            num_tokens_per_expert = torch.full((math.prod(x.shape[:-2]),), x.shape[-2], device=x.device)
            out = self._compute_rows(x.flatten(0, -2), num_tokens_per_expert)
            return unsafe_view(out, (*x.shape[:-1], out.shape[-1]))
        reject_batch_invariance(f"{type(self).__name__} implements its own computation of rows")
        permutation = permute_without_gaps(assignments)
        assert permutation.rows_per_expert is not None
        rows = dispatch(x, permutation)
        return combine(self._compute_rows(rows, permutation.rows_per_expert), permutation)

    def _compute_rows(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        out = self.compute(rows, num_tokens_per_expert)
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != rows.shape[0]:
            name = f"{type(self).__name__}.compute"
            raise ValueError(f"{name} must return a 2-D tensor with {len(rows)} rows, got {describe_shape(out)}")
        return out

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """Apply each expert to its own rows, and return one output row per input row.

        Args:
            rows: `(r, d)`, sorted by expert. Unused rows may follow the last expert's rows, and their outputs are
                ignored.
            num_tokens_per_expert: `(e,)` int64, number of rows per expert, in outer-major order for a grid of experts.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement compute(rows, num_tokens_per_expert) or a slot-based forward"
        )


def run_experts(experts: nn.Module, x: Tensor, assignments: Assignments) -> Tensor:
    """Apply experts with either interface to the tokens `(t, d)` of a call, and return the outputs `(t, o)`."""
    # some adapters hide the experts' attributes
    unwrapped: Any = experts if isinstance(experts, RoutedExperts) else unwrap_module(experts)
    dim_out = getattr(unwrapped, "dim_out", None)
    if not reads_assignments(experts):
        reject_batch_invariance(f"{type(experts).__name__} reads slots")
        return run_experts_on_slots(experts, x, assignments, dim_out)
    wanted = (x.shape[0], dim_out or x.shape[1])
    out = check_result(type(experts).__name__, experts(x, assignments), wanted, DIM_OUT_HINT)
    return out if unwrapped.allocates_outputs else out.clone()  # the outputs may share memory with x


def binds_assignments(forward: Callable) -> bool:
    """Return whether `forward(self, x, ...)` accepts `assignments` as its second argument, or accepts `*args`."""
    of_self, *parameters = inspect.signature(forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in (of_self, *parameters)):
        return True
    second = parameters[1] if len(parameters) > 1 else None
    if second is not None and second.name == "assignments" and second.kind is not second.KEYWORD_ONLY:
        return True
    if any(parameter.name == "assignments" for parameter in parameters):
        raise TypeError(
            f"{forward.__qualname__} must accept `assignments` as its second argument: forward(self, x, assignments)"
        )
    return False


def reads_assignments(experts: nn.Module) -> bool:
    """Return whether a module, including any module that it wraps, accepts tokens and assignments."""
    while not isinstance(experts, RoutedExperts):
        wrapped = get_wrapped_module(experts)
        if wrapped is None or not binds_assignments(type(experts).forward):  # assume that unknown wrappers read slots
            return False
        experts = wrapped
    return experts.reads_assignments


def check_slot_inputs(experts: Any, x: Tensor, assignments: Any) -> None:
    """Check that `x` has the slot shape `(*e, s, d)` and that no assignments were passed."""
    wanted = (*experts.expert_dims, "s", experts.dim)
    fits = x.ndim == len(wanted) and (*x.shape[:-2], "s", x.shape[-1]) == wanted
    if assignments is not None or not fits:
        rest = (
            ""
            if assignments is None
            else f" and {type(assignments).__name__} (to compute rows with num_tokens_per_expert, call `compute`)"
        )
        raise ValueError(
            f"{type(experts).__name__} with {experts.num_experts} experts expects slots of shape "
            f"({', '.join(map(str, wanted))}), got {tuple(x.shape)}{rest}"
        )


def run_experts_on_slots(
    compute: Callable[[Tensor], Tensor], x: Tensor, assignments: Assignments, dim_out: int | None = None
) -> Tensor:
    """Dispatch tokens to slots, fill empty slots with zeros, apply the experts, and combine the results."""
    permutation = permute_dropless_slots(assignments) if assignments.routing is None else permute_to_slots(assignments)
    slots = dispatch(x, permutation)
    slots = slots.view(
        *permutation.expert_dims, permutation.num_rows // math.prod(permutation.expert_dims), slots.shape[-1]
    )
    out = check_result("experts", compute(slots), (*slots.shape[:-1], dim_out or slots.shape[-1]), DIM_OUT_HINT)
    # `flatten(0, -2)` would add a guard on whether a dynamic length is 1
    return combine(out.flatten().view(permutation.num_rows, out.shape[-1]), permutation)


def permute_dropless_slots(assignments: Assignments) -> Permutation:
    """Return a permutation that assigns the tokens of a dropless call to slots.

    If the host can read the assignments without a sync, each expert gets as many slots as the busiest expert needs.
    Otherwise, each expert gets one slot per token, and a warning is emitted if most slots would remain empty.
    """
    t, e = assignments.num_tokens, math.prod(assignments.expert_dims)
    if is_host_readable(assignments.kept):

        def pad_to_fullest(needed: Tensor) -> tuple[Tensor, int]:
            width = max(int(needed.max()), min(t, 1))
            return torch.full_like(needed, width), e * width

        return permute_with_padding(assignments, pad_to_fullest)
    if has_data(assignments.kept) and e * t > MAX_SLOTS_PER_CHOICE * assignments.weight.shape[0]:
        warnings.warn(
            f"the gate is dropless, so experts that read slots need {e} x {t} slots for {assignments.weight.shape[0]} "
            "choices. To save memory, set capacity_factor_train and capacity_factor_eval on the gate (with 2.0, each "
            "expert accepts up to twice its even share), or make the experts a subclass of RoutedExperts",
            stacklevel=2,
        )
    return permute_to_slots(assignments)


def _check_dropout(name: str, value: Any) -> float:
    """Check that the dropout rate is below 1. A rate of 0 is returned as an integer, because compiled graphs with
    dynamic shapes treat floats as inputs."""
    return check_number(name, value, at_least=0.0, below=1.0) or 0


class StackedExperts(FixedShapeModule, RoutedExperts):
    """Base class for experts with stacked weights. It implements initialization, shape checks and both interfaces.

    `forward` passes tokens and assignments to `ops.routed_ffn`, which selects the fastest implementation. Wrappers,
    expert parallelism, and callers that sort rows themselves use `compute` or slots instead.
    """

    dim: int
    dim_out: int
    expert_dims: tuple[int, ...]
    hidden_dim: int
    act: nn.Module

    gated: ClassVar[bool]
    shape_attributes: ClassVar[tuple[str, ...]] = ("dim", "dim_out", "num_experts", "hidden_dim", "expert_dims")
    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter  # gated experts only
    b1: nn.Parameter | None
    b2: nn.Parameter | None
    b3: nn.Parameter | None  # gated experts only
    dropout: float = checked_setting(_check_dropout)

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, ...] = 16,
        hidden_dim: int | None = None,
        activation: ActivationLike = nn.GELU,
        bias: bool = False,
        *,
        dim_out: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_dtype("dtype", dtype)
        d = self.dim = check_size("dim", dim)
        o = self.dim_out = check_size("dim_out", dim if dim_out is None else dim_out)
        self.num_experts = num_experts
        self.expert_dims = check_sizes("num_experts", num_experts)
        h = self.hidden_dim = check_size("hidden_dim", 4 * dim if hidden_dim is None else hidden_dim)
        self.act = make_activation(activation)
        if self.act is not activation:  # PyTorch's activation classes create float32 parameters
            self.act.to(device=device, dtype=dtype)
        self.dropout = dropout
        if takes_gate_and_up(self.act) and not self.gated:
            raise ValueError(f"activation {activation!r} takes (gate, up) as arguments, so it requires GatedExperts")
        shapes: dict[str, Any] = {"w1": (d, h), "w3": (d, h), "w2": (h, o)}
        biases = {"b1": (h,), "b3": (h,), "b2": (o,)}
        shapes |= biases if check_flag("bias", bias) else dict.fromkeys(biases)
        for name, shape in shapes.items():
            if self.gated or not name.endswith("3"):
                # writing zeros allocates memory pages with all threads, while drawing the weights uses one thread
                zeros = None if shape is None else torch.zeros(*self.expert_dims, *shape, device=device, dtype=dtype)
                self.register_parameter(name, None if zeros is None else nn.Parameter(zeros))
        self.reset_parameters()

    def forward(
        self, x: Tensor, assignments: Assignments | None = None, *, ffn: Callable[..., Tensor] = routed_ffn
    ) -> Tensor:
        """Apply the experts to tokens or slots; see `RoutedExperts`. A wrapper can pass its own `ffn` to process
        tokens."""
        network = self._build_network()
        if isinstance(assignments, Assignments):
            return ffn(x, assignments, network, training=self.training)
        check_slot_inputs(self, x, assignments)
        out = feed_forward(*cast_operands(x.flatten(0, -3), network))
        return unsafe_view(out, (*x.shape[:-1], out.shape[-1]))

    def variant_reason(self) -> str | None:
        if self.training and self.dropout:
            return f"dropout={self.dropout} draws random numbers in training; set it to 0, or call eval()"
        reason = unknown_activation_reason(self.act)
        return None if reason is None else f"{reason}; use an activation of this package, without hooks"

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """Apply the experts to rows that a wrapper or another rank has sorted by expert. `forward` does not call this
        method."""
        rows, network = cast_operands(rows, self._build_network())
        return feed_forward(rows, network, num_tokens_per_expert, grouped_matmul)

    def _build_network(self) -> Network:
        """Return the weights as a `Network`, flattening a grid of experts to one dimension."""
        w_in, b_in = ((self.w1, self.w3), (self.b1, self.b3)) if self.gated else ((self.w1,), (self.b1,))
        dropout = self.dropout if self.training else 0.0
        network = Network(w_in, self.w2, self.act, b_in, self.b2, dropout=dropout)
        if len(self.expert_dims) == 1:
            return network
        last = len(self.expert_dims) - 1
        return network.map(lambda tensor: tensor.flatten(0, last))

    def reset_parameters(self) -> None:
        """Initialize each expert's weights from a uniform distribution with standard deviation 1 / sqrt(fan_in), and
        set all biases to 0."""
        init_expert_weights(self)

    def extra_repr(self) -> str:
        out = "" if self.dim_out == self.dim else f", dim_out={self.dim_out}"
        bias = "" if getattr(self, "b2", None) is None else ", bias=True"
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"{self.dim}, {self.num_experts}, hidden_dim={self.hidden_dim}{out}{bias}{dropout}"


def init_expert_weights(module: nn.Module) -> None:
    """Initialize weights `(..., d, h)` from a uniform distribution with standard deviation 1 / sqrt(fan_in). Biases,
    whose names start with `b`, are set to 0."""
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("b"):
            nn.init.zeros_(parameter)
        else:
            bound = math.sqrt(3 / parameter.shape[-2])
            nn.init.uniform_(parameter, -bound, bound)


class Experts(StackedExperts):
    """Two-layer feed-forward experts, `act(x w1) w2`.

    Args:
        dim: model dimension, d.
        num_experts: number of experts, e, or a tuple for a grid of experts.
        hidden_dim: hidden dimension, h. Default: 4 d.
        activation: a class such as `nn.GELU`, a module, or a function.
        bias: whether to add biases `b1 (*e, h)` and `b2 (*e, o)`.
        dim_out: width of the outputs, o. Default: d.
        dropout: probability of zeroing an element of the hidden layer during training ("expert dropout" in Switch,
            arXiv 2101.03961). With dropout, the forward pass uses PyTorch's own operators.
        device, dtype: device and dtype of the parameters.

    Shape:
        The experts map slots `(*e, s, d)` to `(*e, s, o)`, or tokens `(t, d)` and their assignments to `(t, o)`. `w1`
        has the shape `(*e, d, h)`, and `w2` has the shape `(*e, h, o)`.

    Example:
        >>> import torch
        >>> experts = Experts(dim=8, num_experts=4)
        >>> experts(torch.randn(4, 5, 8)).shape
        torch.Size([4, 5, 8])
        >>> experts.compute(torch.randn(6, 8), torch.tensor([3, 0, 2, 1])).shape
        torch.Size([6, 8])
    """

    gated = False

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("version") == 1 and not isinstance(self.act, nn.ReLU):
            warnings.warn(
                f"this state dict was written by mixture-of-experts 0.2.3, whose experts used ReLU by default, but "
                f"these experts use {self.act}. Pass activation=nn.ReLU to the layer unless it was trained with "
                f"{self.act}",
                stacklevel=2,
            )


class GatedExperts(StackedExperts):
    """Gated feed-forward experts, `(act(x w1) * (x w3)) w2`: SwiGLU, or GEGLU with `activation=nn.GELU`
    (arXiv 2002.05202).

    Args:
        dim: model dimension, d.
        num_experts: number of experts, e, or a tuple for a grid of experts.
        hidden_dim: hidden dimension, h. Default: 4 d.
        activation: a class such as `nn.SiLU`, a module, or a function. A function of two tensors, `x w1` and `x w3`,
            such as `ops.ClampedSwiGLU`, must return the complete hidden activations.
        bias: whether to add biases `b1, b3 (*e, h)` and `b2 (*e, o)`.
        dim_out: width of the outputs, o. Default: d.
        dropout: probability of zeroing an element of the hidden layer during training ("expert dropout" in Switch,
            arXiv 2101.03961). With dropout, the forward pass uses PyTorch's own operators.
        device, dtype: device and dtype of the parameters.

    Shape:
        The experts map slots `(*e, s, d)` to `(*e, s, o)`, or tokens `(t, d)` and their assignments to `(t, o)`. `w1`
        and `w3` have the shape `(*e, d, h)`, and `w2` has the shape `(*e, h, o)`.

    Example:
        >>> import torch
        >>> experts = GatedExperts(dim=8, num_experts=4, hidden_dim=16)
        >>> experts(torch.randn(4, 5, 8)).shape
        torch.Size([4, 5, 8])
    """

    gated = True

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, ...] = 16,
        hidden_dim: int | None = None,
        activation: ActivationLike = nn.SiLU,
        bias: bool = False,
        *,
        dim_out: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, num_experts, hidden_dim, activation, bias, dim_out=dim_out, dropout=dropout, device=device, dtype=dtype
        )


def check_expert_modules(experts: Any) -> list[nn.Module]:
    """Check that all elements of `experts` are modules, and return them as a list."""
    if not isinstance(experts, Iterable):
        raise TypeError(f"experts must be a list of modules, got a {type(experts).__name__}")
    modules = list(experts)
    for i, expert in enumerate(modules):
        if not isinstance(expert, nn.Module):
            got = f"the class {expert.__name__}; instantiate it first" if isinstance(expert, type) else repr(expert)
            raise TypeError(f"experts[{i}] must be a module that maps (n, d) to (n, d), got {got}")
    return modules


class ExpertList(RoutedExperts, nn.ModuleList):
    """A list of expert modules that each map `(n, d)` to `(n, d)`.

    If the capacity is limited, each module receives all slots of its expert, and empty slots are filled with zeros. In
    dropless calls, each module receives only its expert's rows, which requires one host sync to read the row counts.
    Slots are also used if tensor values are not available, which is the case in traced graphs, in `torch.func`
    transforms, and on the meta device.

    Args:
        experts: one module per expert, in outer-major order for a grid of experts.
        dim_out: width of the outputs, o. Default: d.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> experts = ExpertList(nn.Linear(8, 8) for _ in range(4))
        >>> experts(torch.randn(4, 5, 8)).shape
        torch.Size([4, 5, 8])
    """

    dim_out: int | None

    def __init__(self, experts: Iterable[nn.Module], *, dim_out: int | None = None) -> None:
        super().__init__(check_expert_modules(experts))
        self.dim_out = None if dim_out is None else check_size("dim_out", dim_out)
        if len(self) == 0:
            raise ValueError("ExpertList needs at least one module, got none")

    @property
    def num_experts(self) -> int:
        return len(self)

    def forward(self, x: Tensor, assignments: Assignments | None = None) -> Tensor:
        if assignments is None:
            return self._run_on_slots(x.clone())  # experts may modify their input in place
        if assignments.dropless and has_data(x):
            return super().forward(x, assignments)
        return run_experts_on_slots(self._run_on_slots, x, assignments, self.dim_out)

    def _run_on_slots(self, x: Tensor) -> Tensor:
        slots = x.flatten(0, -3)
        if slots.shape[0] != len(self):
            raise ValueError(
                f"ExpertList with {len(self)} modules expects x of shape ({len(self)}, s, d), got {x.shape}"
            )
        results = torch.stack([self._call_expert(i, part) for i, part in enumerate(unsafe_view_each(slots.unbind(0)))])
        return unsafe_view(results, (*x.shape[:-1], results.shape[-1]))

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        numbers = num_tokens_per_expert.tolist()  # this is the only host synchronization
        parts = unsafe_view_each(rows.split([*numbers, rows.shape[0] - sum(numbers)]))
        results = [self._call_expert(i, part) for i, part in enumerate(parts[:-1])]
        return torch.cat([*results, results[0].new_zeros(parts[-1].shape[0], results[0].shape[-1])])

    def _call_expert(self, index: int, x: Tensor) -> Tensor:
        expert, name = self[index], f"expert {index} ({type(self[index]).__name__})"
        try:
            out = expert(x)
        except RuntimeError:
            check_devices(name, x, expert.parameters())  # check after the call, because hooks may move the weights
            raise
        check_devices(name, x, expert.parameters() if x.is_meta else ())  # some operators return meta tensors silently
        return check_result(name, out, (*x.shape[:-1], self.dim_out or x.shape[-1]), DIM_OUT_HINT)


def unsafe_view_each(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts as tensors that autograd does not treat as views, so that experts may modify them in place."""
    return [unsafe_view(part, part.shape) for part in parts]
