"""`RoutingRecords`: choices by gate, sequence and real token; selected, saved, and read from serving engines.

Axes: s tokens of a sequence, l gates, k choices of a token.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.gating.given import LIVE
from mixture_of_experts.support.checks import check_optional_size

FORMAT = "mixture_of_experts.routing/1"


class RoutingRecords(Mapping[str, list[Tensor]]):
    """The experts of every real token of some sequences: a mapping from each gate of a model to a list of sequences.

    A choice is a number: an expert; or -1, no choice; or -2 - i, which means that expert i takes its share of the
    token's weight, but does not compute the token (capacity or a policy dropped it). In a layer of two levels each gate
    has its own choices. Level two has `k * k2` for each token: first those for its first choice of level one.

    Args:
        experts: for each gate, by name, a tensor of integers `(s, k)` for each sequence.
        num_experts: for each gate, by name, its number of experts, if it is known.
        weights: for each gate, by name, the weights `(s, k)` of these choices for each sequence; None: the choices
            alone are known.

    Raises:
        ValueError: gates have records of different numbers of sequences; a record is no tensor of integers `(s, k)`; or
            the weights are not floating point of the same shapes.

    Example:
        >>> import torch
        >>> first, second = torch.tensor([[0, 2], [1, 0], [3, 1]]), torch.tensor([[2, 3]])
        >>> records = RoutingRecords({"gate": [first, second]}, {"gate": 4})
        >>> list(records), records.num_sequences, records.lengths("gate")
        (['gate'], 2, [3, 1])
        >>> records["gate"][1].tolist()
        [[2, 3]]
        >>> records.select([1, 0])["gate"][1].tolist()
        [[0, 2], [1, 0], [3, 1]]
    """

    def __init__(
        self,
        experts: Mapping[str, Sequence[Tensor]],
        num_experts: Mapping[str, int | None] | None = None,
        weights: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        of_gates = by_gate("experts", experts)
        self._experts = {name: [integers(record) for record in sequences] for name, sequences in of_gates.items()}
        self._num_experts = dict(num_experts or {})
        self._weights = None if weights is None else by_gate("weights", weights)
        self._unread: Callable[[RoutingRecords], None] | None = None  # moves what a recording stored to these records
        numbers = {name: len(sequences) for name, sequences in self._experts.items()}
        if not numbers or len(set(numbers.values())) > 1:
            raise ValueError(f"every gate needs a record of every sequence, got numbers of sequences {numbers}")
        for name, sequences in self._experts.items():
            for record in sequences:
                if not isinstance(record, Tensor) or record.ndim != 2 or not is_integer(record):
                    got = f"{record.dtype} {tuple(record.shape)}" if isinstance(record, Tensor) else repr(record)
                    raise ValueError(f"a record of {name!r} must be integers (tokens, k), got {got}")
            if len({record.shape[1] for record in sequences}) > 1:
                raise ValueError(f"records of {name!r} have different numbers of choices")
        for name, number in self._num_experts.items():
            check_optional_size(f"num_experts[{name!r}]", number)
        if self._weights is not None:
            check_weights(self._experts, self._weights)

    @property
    def layers(self) -> tuple[str, ...]:
        """The gates, in the model's order."""
        return tuple(self._all)

    def num_experts(self, layer: str) -> int | None:
        """The number of experts of a gate; None if it is not known."""
        return self._num_experts.get(layer)

    def k(self, layer: str) -> int | None:
        """Choices of a token at a gate; None if there is no sequence."""
        return next((record.shape[1] for record in self[layer]), None)

    @property
    def weights(self) -> dict[str, list[Tensor]] | None:
        """For each gate the weights `(s, k)` of its choices in each sequence, 0 where an expert does not compute; None
        if choices alone were recorded."""
        if self._unread is not None:
            self._unread(self)
        return self._weights

    def lengths(self, layer: str) -> list[int]:
        """The number of recorded tokens of each sequence at a gate."""
        return [len(record) for record in self[layer]]

    @property
    def num_sequences(self) -> int:
        """The number of sequences, which is the same at every gate."""
        return len(next(iter(self._all.values())))

    def __len__(self) -> int:
        return len(self._all)

    def __eq__(self, other: object) -> bool:
        return self is other  # tensors have no single answer to ==

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, layer: str) -> list[Tensor]:
        """The choices `(s, k)` of the real tokens of each sequence at a gate, on the CPU."""
        if layer not in self._all:
            raise KeyError(f"no gate {layer!r}: there are {', '.join(map(repr, self._all))}")
        return self._all[layer]

    def select(self, sequences: Sequence[int] | slice, tokens: Sequence[int] | None = None) -> RoutingRecords:
        """The records of some sequences, in the order that you give, for another batch.

        Args:
            sequences: the numbers of the sequences, or a slice.
            tokens: for each of these sequences how many tokens to take, from its beginning; by default all.
        """
        numbers = list(range(self.num_sequences)[sequences]) if isinstance(sequences, slice) else list(sequences)
        wrong = [number for number in numbers if not -self.num_sequences <= number < self.num_sequences]
        if wrong:
            raise IndexError(f"no sequence {wrong[0]}: there are {self.num_sequences}")
        lengths = [None] * len(numbers) if tokens is None else list(tokens)
        if len(lengths) != len(numbers):
            raise ValueError(f"tokens must have a number for each of {len(numbers)} sequences, got {len(lengths)}")
        of_gate = list(zip(numbers, lengths, strict=True))
        for name, records in self._all.items():
            for number, length in of_gate:
                if length is not None and not 0 <= length <= len(records[number]):
                    raise ValueError(f"sequence {number} has {len(records[number])} tokens at {name!r}, not {length}")
        experts, weights = (
            None if found is None else {name: [of[i][:length] for i, length in of_gate] for name, of in found.items()}
            for found in (self._experts, self._weights)
        )
        return RoutingRecords(experts or {}, self._num_experts, weights)

    def array(self, sequence: int) -> Tensor:
        """The record of a sequence as serving engines lay it out, `(s, l, k)`. All gates must have the same s and k."""
        if not -self.num_sequences <= sequence < self.num_sequences:
            raise IndexError(f"no sequence {sequence}: there are {self.num_sequences}")
        shapes = {name: tuple(records[sequence].shape) for name, records in self._all.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"gates differ in tokens or choices, so that no one array holds them: {shapes}")
        return torch.stack([records[sequence] for records in self._all.values()], dim=1)

    @classmethod
    def from_requests(
        cls, requests: Sequence[Any], *, shape: tuple[int, int] | None = None, layers: Sequence[int] | None = None
    ) -> RoutingRecords:
        """Make records from what a serving engine returns for each request.

        vLLM (started with `enable_return_routed_experts`) returns an array `(s, l, k)` of integers, or one for the
        prompt and one for the completion (vllm-project/vllm#28284; docs.vllm.ai, "Routed Experts Replay"). SGLang
        (`return_routed_experts`) returns `meta_info["routed_experts"]`, base64 of int32 `(s, l, k)` without its shape
        (sgl-project/sglang#12162). The last token of a completion has no record: the engine never read it. A row of
        nothing but -1 means that the engine did not record it: there the gate chooses.

        Args:
            requests: for each request an array or tensor `(s, l, k)` or nested lists; a tuple of these, which follow
                each other; or a base64 string.
            shape: `(l, k)`, which strings do not tell.
            layers: which of the l layers have gates, in the model's order, if the engine returns dense layers too; by
                default all.

        Example:
            >>> prompt = [[[0, 1], [2, 3]], [[1, 0], [3, 2]]]  # two tokens, two layers, two choices
            >>> records = RoutingRecords.from_requests([(prompt, [[[2, 1], [0, 1]]])])
            >>> records.lengths("0"), records["1"][0].tolist()
            ([3], [[2, 3], [3, 2], [0, 1]])
        """
        arrays = [read_request(request, number, shape) for number, request in enumerate(requests)]
        if not arrays:
            raise ValueError("there is no request: give one array for each")
        shapes = {tuple(array.shape[1:]) for array in arrays}
        if len(shapes) > 1:
            raise ValueError(f"requests differ in layers or choices: (l, k) are {sorted(shapes)}")
        of_all = range(arrays[0].shape[1])
        chosen = list(of_all) if layers is None else list(layers)
        if wrong := [layer for layer in chosen if not isinstance(layer, Integral) or layer not in of_all]:
            raise ValueError(f"layers has {wrong[0]!r}, the requests have 0 to {len(of_all) - 1}")
        return cls({str(i): [array[:, layer] for array in arrays] for i, layer in enumerate(chosen)})

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file that `load` reads."""
        layers = {
            name: {
                "num_experts": self.num_experts(name),
                "lengths": torch.tensor(self.lengths(name), dtype=torch.int64),
                "experts": torch.cat(records) if records else torch.zeros(0, 0, dtype=torch.int16),
                **({} if self._weights is None or not records else {"weights": torch.cat(self._weights[name])}),
            }
            for name, records in self._all.items()
        }
        torch.save({"format": FORMAT, "layers": layers}, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RoutingRecords:
        """Read a file that `save` wrote; nothing in it is executed (`weights_only`).

        Raises:
            ValueError: the file is of another kind, or not whole.
        """
        try:
            found = torch.load(path, weights_only=True, map_location="cpu")
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except Exception as error:  # for a cut file torch.load raises OSError, EOFError, TypeError and others
            raise ValueError(f"{path} is not whole, or no file of RoutingRecords.save: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            has = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{path} is no file of RoutingRecords.save: its format is {has!r}, wanted {FORMAT!r}")
        try:
            layers = found["layers"]
            experts = {name: list(part["experts"].split(part["lengths"].tolist())) for name, part in layers.items()}
            weights = {
                name: part["weights"].split(part["lengths"].tolist())
                for name, part in layers.items()
                if "weights" in part
            }
            return cls(experts, {name: part["num_experts"] for name, part in layers.items()}, weights or None)
        except (KeyError, AttributeError, TypeError, RuntimeError, ValueError) as error:
            said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} is not whole: {said}. Save the records again") from error

    @property
    def _all(self) -> dict[str, list[Tensor]]:
        if self._unread is not None:
            self._unread(self)
        return self._experts

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_sequences} sequences, {len(self)} gates)"

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)


def by_gate(name: str, given: Any) -> dict[str, list[Tensor]]:
    """The tensors of each gate, one for each sequence; TypeError if they are given in another way."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a dict of records by gate, got a {type(given).__name__}")
    for gate, sequences in given.items():
        if not isinstance(sequences, Iterable):
            raise TypeError(f"{name}[{gate!r}] must be a list of tensors, one a sequence, got {sequences!r}")
    return {gate: list(sequences) for gate, sequences in given.items()}


def check_weights(experts: Mapping[str, list[Tensor]], weights: Mapping[str, list[Tensor]]) -> None:
    """Check that every choice has a weight."""
    if weights.keys() != experts.keys():
        raise ValueError(
            f"weights are of gates {', '.join(weights)}, the choices of {', '.join(experts)}: give both for each gate"
        )
    for name, sequences in experts.items():
        wanted = [tuple(record.shape) for record in sequences]
        tensors = [weight for weight in weights[name] if isinstance(weight, Tensor)]
        found = [tuple(weight.shape) for weight in tensors if weight.is_floating_point()]
        if found != wanted or len(tensors) != len(weights[name]):
            raise ValueError(f"weights of {name!r} must be floating point {wanted}, as its choices are, got {found}")


def read_request(request: Any, number: int, shape: tuple[int, int] | None) -> Tensor:
    """The choices `(s, l, k)` of a request."""
    if isinstance(request, tuple):
        parts = [read_request(part, number, shape) for part in request]
        if len({part.shape[1:] for part in parts}) != 1:
            raise ValueError(
                f"parts of request {number} must agree in layers and k, got {[(*p.shape,) for p in parts]}"
            )
        return torch.cat(parts)
    array = from_base64(request, number, shape) if isinstance(request, str) else as_tensor(request, number)
    if array.ndim != 3 or not is_integer(array):
        got = f"{array.dtype} {tuple(array.shape)}"
        raise ValueError(f"request {number} must be integers (tokens, layers, k), got {got}")
    array = integers(array.cpu()).to(torch.int64)
    if array.numel() and not LIVE <= int(array.min()) <= int(array.max()) < 1 << 31:
        raise ValueError(
            f"request {number} has experts {int(array.min())} to {int(array.max())}: give ids of experts from 0, and "
            "-1 for none"
        )
    array = array.to(torch.int32)
    return torch.where((array == -1).all(dim=-1, keepdim=True), LIVE, array)


def as_tensor(request: Any, number: int) -> Tensor:
    try:
        return request if isinstance(request, Tensor) else torch.tensor(request)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"request {number} must be integers (tokens, layers, k), got a {type(request).__name__}: {error}"
        ) from error


def is_integer(array: Tensor) -> bool:
    return not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)


def integers(array: Any) -> Any:
    """An array of a dtype in which torch computes: it does little with unsigned integers of two bytes and more."""
    if isinstance(array, Tensor) and array.dtype in (torch.uint16, torch.uint32, torch.uint64):
        wide = array.to(torch.int64)
        return wide.where(wide >= 0, torch.iinfo(torch.int64).max)  # above the most of int64
    return array


def from_base64(text: str, number: int, shape: tuple[int, int] | None) -> Tensor:
    """The choices `(s, l, k)` of a string, base64 of int32."""
    if shape is None:
        raise ValueError("a base64 string does not tell its shape: give shape=(layers, k)")
    try:
        raw = bytearray(base64.b64decode(text, validate=True))
    except ValueError as error:
        raise ValueError(f"request {number} is no base64: {error}") from error
    if len(raw) % (4 * shape[0] * shape[1]):
        raise ValueError(f"request {number} has {len(raw)} bytes, no multiple of {shape[0]} layers of {shape[1]} int32")
    values = torch.frombuffer(raw, dtype=torch.int32) if raw else torch.zeros(0, dtype=torch.int32)
    return values.view(-1, *shape)
