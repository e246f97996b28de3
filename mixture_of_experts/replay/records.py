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
        self._experts = of_gates = tensors_of("experts", experts)
        self._weights = None if weights is None else tensors_of("weights", weights)
        self._num_experts = dict(num_experts or {})
        self._unread: Callable[[dict[str, Any]], None] | None = None  # moves what a recording stored to these records
        numbers = {name: len(sequences) for name, sequences in of_gates.items()}
        if not numbers or len(set(numbers.values())) > 1:
            raise ValueError(f"every gate needs a record of every sequence, got numbers of sequences {numbers}")
        for name, sequences in of_gates.items():
            for record in sequences:
                if record.ndim != 2 or not is_integer(record):
                    got = f"{record.dtype} {tuple(record.shape)}"
                    raise ValueError(f"a record of {name!r} must be integers (tokens, k), got {got}")
            if len({record.shape[1] for record in sequences}) > 1:
                raise ValueError(f"records of {name!r} have different numbers of choices")
            check_optional_size(f"num_experts[{name!r}]", self._num_experts.get(name))
        if self._weights is not None:
            floating = {name: [w.shape for w in of if w.is_floating_point()] for name, of in self._weights.items()}
            wanted = {name: [record.shape for record in of] for name, of in of_gates.items()}
            if floating != wanted:
                raise ValueError(f"weights must be floating point {wanted}, as the choices are, got {floating}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The gates, in the model's order."""
        return tuple(self._read()["experts"])

    def num_experts(self, layer: str) -> int | None:
        """The number of experts of a gate; None if it is not known."""
        return self._num_experts.get(layer)

    @property
    def weights(self) -> dict[str, list[Tensor]] | None:
        """For each gate the weights `(s, k)` of its choices in each sequence, 0 where an expert does not compute; None
        if choices alone were recorded."""
        return self._read().get("weights")

    def lengths(self, layer: str) -> list[int]:
        """The number of recorded tokens of each sequence at a gate."""
        return [len(record) for record in self[layer]]

    @property
    def num_sequences(self) -> int:
        """The number of sequences, which is the same at every gate."""
        return len(next(iter(self.values())))

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __eq__(self, other: object) -> bool:
        return self is other  # tensors have no single ==

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, layer: str) -> list[Tensor]:
        """The choices `(s, k)` of the real tokens of each sequence at a gate, on the CPU."""
        if layer not in self.layers:
            raise KeyError(f"no gate {layer!r}: there are {', '.join(map(repr, self.layers))}")
        return self._experts[layer]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_sequences} sequences, {len(self)} gates)"

    def _read(self) -> dict[str, dict[str, list[Tensor]]]:
        """The "experts" of all gates, and "weights" if there are any, with what a recording still held."""
        kept = {"experts": self._experts} | ({} if self._weights is None else {"weights": self._weights})
        if self._unread is not None:
            self._unread(kept)
        return kept

    def select(self, sequences: Sequence[int] | slice, tokens: Sequence[int] | None = None) -> RoutingRecords:
        """The records of some sequences, in the order that you give, for another batch.

        Args:
            sequences: the numbers of the sequences, or a slice.
            tokens: for each of these sequences how many tokens to take, from its beginning; by default all.
        """
        numbers = list(range(self.num_sequences)[sequences]) if isinstance(sequences, slice) else list(sequences)
        if wrong := [number for number in numbers if not -self.num_sequences <= number < self.num_sequences]:
            raise IndexError(f"no sequence {wrong[0]}: there are {self.num_sequences}")
        cuts = [None] * len(numbers) if tokens is None else list(tokens)
        if len(cuts) != len(numbers):
            raise ValueError(f"tokens must have a number for each of {len(numbers)} sequences, got {len(cuts)}")
        of_gate = list(zip(numbers, cuts, strict=True))
        for name, records in self.items():
            for number, cut in of_gate:
                if cut is not None and not 0 <= cut <= len(records[number]):
                    raise ValueError(f"sequence {number} has {len(records[number])} tokens at {name!r}, not {cut}")
        selected = {
            kind: {name: [of[number][:cut] for number, cut in of_gate] for name, of in kept.items()}
            for kind, kept in self._read().items()
        }
        return RoutingRecords(**selected, num_experts=self._num_experts)

    @classmethod
    def from_requests(
        cls,
        requests: Sequence[Any],
        *,
        shape: tuple[int, int] | None = None,
        layers: Sequence[int] | None = None,
        weights: Sequence[Any] | None = None,
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
            weights: for each request the weights `(s, l, k)` of these choices, floating point, as experts' outputs are
                multiplied by them; in parts if the request is. Where the gate chooses, it also weighs.

        Raises:
            ValueError: an array is of another kind; or requests, parts or weights differ in shape.

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
        chosen = of_all if layers is None else layers
        if wrong := [layer for layer in chosen if not isinstance(layer, Integral) or layer not in of_all]:
            raise ValueError(f"layers has {wrong[0]!r}, the requests have 0 to {len(of_all) - 1}")

        def of_gates(arrays: Sequence[Tensor]) -> dict[str, list[Tensor]]:
            return {str(i): [array[:, layer] for array in arrays] for i, layer in enumerate(chosen)}

        if weights is None:
            return cls(of_gates(arrays))
        weighed = [read_request(request, number, None, floating=True) for number, request in enumerate(weights)]
        if [weight.shape for weight in weighed] != [array.shape for array in arrays]:
            wanted, got = ([tuple(array.shape) for array in of] for of in (arrays, weighed))
            raise ValueError(f"weights must have the shapes {wanted} of the choices, got {got}")
        live = [weight.masked_fill(array == LIVE, torch.nan) for array, weight in zip(arrays, weighed, strict=True)]
        return cls(of_gates(arrays), None, of_gates(live))

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file that `load` reads."""
        layers: dict[str, dict[str, Any]] = {}
        for name in self:
            layers[name] = {"num_experts": self.num_experts(name), "lengths": torch.tensor(self.lengths(name)).long()}
            for kind, kept in self._read().items():
                layers[name][kind] = torch.cat(kept[name] or [torch.zeros(0, 0, dtype=torch.int16)])
        torch.save({"format": FORMAT, "layers": layers}, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RoutingRecords:
        """Read a file that `save` wrote; nothing in it is executed (`weights_only`).

        Raises:
            ValueError: the file is of another kind, or not whole.
        """
        try:
            found = torch.load(path, weights_only=True, map_location="cpu")
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}, wanted {FORMAT!r}")
            layers = found["layers"]
            weighed = any("weights" in part for part in layers.values())
            kept = {
                kind: {name: part[kind].split(part["lengths"].tolist()) for name, part in layers.items()}
                for kind in (("experts", "weights") if weighed else ("experts",))
            }
            return cls(**kept, num_experts={name: part["num_experts"] for name, part in layers.items()})
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except Exception as error:  # for a cut file torch.load raises OSError, EOFError, TypeError and others
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is not whole, or no file of RoutingRecords.save: {what}") from error


def tensors_of(name: str, given: Any) -> dict[str, list[Tensor]]:
    """The tensors of each gate, one for each sequence; TypeError if they are given in another way."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a dict of records by gate, got a {type(given).__name__}")
    found = {}
    for gate, sequences in given.items():
        found[gate] = list(sequences) if isinstance(sequences, Iterable) else [sequences]
        if not all(isinstance(record, Tensor) for record in found[gate]):
            raise TypeError(f"{name}[{gate!r}] must be a list of tensors, one a sequence, got {sequences!r}")
        found[gate] = [integers(record) for record in found[gate]]
    return found


def read_request(request: Any, number: int, shape: tuple[int, int] | None, floating: bool = False) -> Tensor:
    """The choices `(s, l, k)` of a request, or their weights, float32."""
    kind = "floating point" if floating else "integers"
    try:
        if isinstance(request, tuple):
            return torch.cat([read_request(part, number, shape, floating) for part in request])
        array = from_base64(request, shape) if isinstance(request, str) else torch.as_tensor(request)
        if array.ndim != 3 or not (array.is_floating_point() if floating else is_integer(array)):
            raise ValueError(f"{array.dtype} {tuple(array.shape)}")
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"a {type(request).__name__}: {error}"
        raise ValueError(f"request {number} must be {kind} (tokens, layers, k), got {got}") from error
    if floating:
        return array.cpu().float()
    wide = integers(array.cpu()).to(torch.int64)
    array = wide.to(torch.int32)
    array = array if array.equal(wide) else wide  # a replay tells what is no expert
    return torch.where((array == -1).all(dim=-1, keepdim=True), LIVE, array)


def from_base64(text: str, shape: tuple[int, int] | None) -> Tensor:
    """The choices `(s, l, k)` of a string, base64 of int32."""
    if shape is None:
        raise ValueError("a base64 string does not tell its shape: give shape=(layers, k)")
    raw = bytearray(base64.b64decode(text, validate=True))
    return (torch.frombuffer(raw, dtype=torch.int32) if raw else torch.zeros(0, dtype=torch.int32)).view(-1, *shape)


def is_integer(array: Tensor) -> bool:
    return not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)


def integers(array: Tensor) -> Tensor:
    """An array of a dtype in which torch computes: it does little with unsigned integers of two bytes and more."""
    if array.dtype in (torch.uint16, torch.uint32, torch.uint64):
        wide = array.to(torch.int64)
        return wide.where(wide >= 0, torch.iinfo(torch.int64).max)  # above the most of int64
    return array
