"""Defines `RoutingRecords`, which stores each gate's choices for each sequence and token. Records can be filtered,
saved, and created from the outputs of serving engines.

Axes: s (tokens in a sequence), l (gates), k (choices per token).
"""

from __future__ import annotations

import shutil
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from mixture_of_experts.gating.overrides import KEEP_ROUTER_CHOICE
from mixture_of_experts.support.checks import check_optional_size

RECORDS_FORMAT = "mixture_of_experts.routing/2"
READ_LOCK = threading.Lock()

#: a gate's record of a forward pass: (1) the chosen experts `(b, n, k)`, and their weights if recorded; (2) the mask
#: `(b, n)` of real tokens (None if all are real), or for packed rows, each token's sequence number (int64, -1 for
#: padding); (3) the number of earlier tokens in each sequence, `(b,)` or one number for all
RecordedForward = tuple[list[Tensor], "Tensor | None", "Tensor | int"]


class RoutingRecords(Mapping[str, list[Tensor]]):
    """A mapping from gate names to expert choices. The choices of a gate are a list with one tensor per sequence.
    Padding is excluded.

    A choice is an integer: the index of an expert, -1 for no choice, or -2 - i. The value -2 - i means that expert i
    keeps its share of the token's weight but does not compute the token, because capacity or a policy dropped it.

    Args:
        experts: lists of integer tensors `(s, k)`, one tensor per sequence, keyed by gate name.
        num_experts: the number of experts, if known, keyed by gate name.
        weights: lists of the choices' weights `(s, k)`, one tensor per sequence, keyed by gate name. None if only the
            choices are known.

    Raises:
        ValueError: the gates have different numbers of sequences, the sequences of a gate have different numbers of
            choices, a record is not an integer tensor `(s, k)`, or the weights are not floating-point tensors with the
            same shapes as the choices.

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
        self._experts = check_records("experts", experts, "integers", is_integer_tensor)
        self._weights = (
            None if weights is None else check_records("weights", weights, "floating point", torch.is_floating_point)
        )
        self._num_experts = {
            name: check_optional_size(f"num_experts[{name!r}]", e) for name, e in (num_experts or {}).items()
        }
        # data recorded in each forward pass, keyed by gate
        self._unread: list[dict[str, RecordedForward]] = []
        if not self._experts:
            raise ValueError("`experts` is empty; pass a list of records for each gate")
        wanted, got = (
            {name: [tuple(record.shape) for record in of] for name, of in kept.items()}
            for kept in (self._experts, self._weights or self._experts)
        )
        if wanted != got:
            raise ValueError(f"expected `weights` to have the same shapes as the choices, {wanted}, but got {got}")
        if len(set(map(len, wanted.values()))) > 1 or any(len({k for _, k in of}) > 1 for of in wanted.values()):
            raise ValueError(
                "expected all gates to have the same number of sequences, and all sequences of a gate to have the same "
                f"k, but got {wanted}"
            )

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the gates, in the same order as in the model."""
        return tuple(self._experts)

    def num_experts(self, layer: str) -> int | None:
        """Return the number of experts of a gate, or None if it is unknown."""
        return self._num_experts.get(layer)

    @property
    def weights(self) -> dict[str, list[Tensor]] | None:
        """The weights `(s, k)` of the choices in each sequence, keyed by gate. The weight is 0 if the expert does not
        compute the token. None if only the choices were recorded."""
        self._read_pending()
        return self._weights

    def lengths(self, layer: str) -> list[int]:
        """Return how many tokens of each sequence were recorded at a gate."""
        return [len(record) for record in self[layer]]

    @property
    def num_sequences(self) -> int:
        """The number of sequences, which is the same for every gate."""
        return len(next(iter(self.values())))

    def __len__(self) -> int:
        return len(self._experts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    def __eq__(self, other: object) -> bool:
        return self is other  # compare by identity, because tensors compare elementwise

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, layer: str) -> list[Tensor]:
        """Return a gate's choices on the CPU, as one `(s, k)` tensor per sequence."""
        if layer not in self._experts:
            raise KeyError(f"there is no gate {layer!r}; the gates are {', '.join(map(repr, self.layers))}")
        self._read_pending()
        return self._experts[layer]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_sequences} sequences, {len(self)} gates)"

    def _read_pending(self) -> None:
        """Copy the pending choices of a recording from the device. If an error is raised, the records of all gates
        remain unchanged."""
        if not self._unread:
            return
        with READ_LOCK:  # other threads may read while the recorder appends a forward pass
            unread, both = self._unread.copy(), (self._experts, self._weights or {})
            read: tuple[dict[str, list[Tensor]], ...] = ({}, {})
            for kind, stored in enumerate(both):
                for name, before in stored.items():
                    found = [chosen[name] for chosen in unread if name in chosen]
                    forwards = [(values[kind], mask, seen) for values, mask, seen in found]
                    read[kind][name] = append_forwards(name, before, forwards)
            for stored, new in zip(both, read, strict=True):
                stored.update(new)
            del self._unread[: len(unread)]

    def select(self, sequences: Sequence[int] | slice, tokens: Sequence[int] | None = None) -> RoutingRecords:
        """Return the records of the selected sequences in the given order, for example to replay them with another
        batch.

        Args:
            sequences: indices of the sequences, or a slice.
            tokens: the maximum number of tokens to keep from the start of each selected sequence. Default: all.
        """
        numbers = list(range(self.num_sequences)[sequences]) if isinstance(sequences, slice) else list(sequences)
        cuts = [None] * len(numbers) if tokens is None else list(tokens)
        if len(cuts) != len(numbers) or any(cut is not None and cut < 0 for cut in cuts):
            raise ValueError(
                f"expected `tokens` to be {len(numbers)} nonnegative integers, one per sequence, but got {tokens}"
            )
        if wrong := [number for number in numbers if not -self.num_sequences <= number < self.num_sequences]:
            raise IndexError(f"there is no sequence {wrong[0]}; there are {self.num_sequences} sequences")
        of_gate = list(zip(numbers, cuts, strict=True))

        def selected(kept: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
            return {name: [of[number][:cut] for number, cut in of_gate] for name, of in kept.items()}

        return RoutingRecords(
            selected(self), self._num_experts, None if self.weights is None else selected(self.weights)
        )

    @classmethod
    def from_requests(cls, requests: Sequence[Any], *, weights: Sequence[Any] | None = None) -> RoutingRecords:
        """Create records from the routing results that a serving engine returns for each request.

        vLLM (started with `enable_return_routed_experts`) returns an integer array `(s, l, k)`
        (vllm-project/vllm#28284; docs.vllm.ai, "Routed Experts Replay"). SGLang (`return_routed_experts`) returns
        base64-encoded int32 (sgl-project/sglang#12162). The last token of a completion has no record, because the
        engine never processed it. A row of -1 entries means that the engine did not record the token. The gate then
        chooses the token's experts.

        Args:
            requests: an array, tensor or nested list of shape `(s, l, k)` for each request. Axis l indexes the layers
                with gates, in the same order as in the model.
            weights: the floating-point weights `(s, l, k)` of the experts' outputs, as one array per request. If the
                gate chooses a token's experts, it also computes their weights.

        Raises:
            ValueError: an array has the wrong shape or dtype, or the shapes of the requests or weights are
                inconsistent.

        Example:
            >>> completion = [[[0, 1], [2, 3]], [[1, 0], [3, 2]]]  # two tokens, two layers, two choices
            >>> records = RoutingRecords.from_requests([completion])
            >>> records.lengths("0"), records["1"][0].tolist()
            ([2], [[2, 3], [3, 2]])
        """
        gate_weights = None
        if weights is not None:
            of_gates = parse_requests(weights).items()  # floats become float32; integers raise an error below
            gate_weights = {name: [a.float() if a.is_floating_point() else a for a in of] for name, of in of_gates}
        records = cls(parse_requests(requests), None, gate_weights)
        for sequences in records._experts.values():
            sequences[:] = map(compact_choices, sequences)
        return records

    def save(self, path: str | PathLike[str]) -> None:
        """Write the records to a file that `load` can read. An existing file is replaced only after the new one is
        complete."""
        weights = None if self.weights is None else pack_records(self.weights)
        found = {
            "format": RECORDS_FORMAT,
            "experts": pack_records(self),
            "num_experts": self._num_experts,
            "weights": weights,
        }
        with replaced_when_complete(Path(path)) as unfinished:
            torch.save(found, unfinished)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RoutingRecords:
        """Read records from a file written by `save`. No code in the file is executed, because it is loaded with
        `weights_only`.

        Raises:
            ValueError: the file is incomplete or corrupt, or was not written by `save`.
        """
        with open(path, "rb") as file:
            try:
                if (member := zipfile.ZipFile(file).testzip()) is not None:  # torch does not verify checksums
                    raise ValueError(f"the checksum of {member} is wrong")
                file.seek(0)
                found = torch.load(file, weights_only=True, map_location="cpu")
                if found["format"] != RECORDS_FORMAT:
                    raise ValueError(f"expected the format {RECORDS_FORMAT!r}, but got {found['format']!r}")
                return cls(found["experts"], found["num_experts"], found["weights"])
            except Exception as error:  # torch.load may raise OSError, EOFError, TypeError or other errors
                what = f"it has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{path} is incomplete, or was not written by RoutingRecords.save: {what}") from error


@contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path. On success, the temporary file replaces the file at `path`. On
    error, the temporary file is removed. Symbolic links are followed, and the mode of an existing file is kept. If
    `path` is not a regular file (such as a pipe), the context manager yields `path` itself."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    unfinished = path.with_name(f".{uuid4().hex}.unfinished")
    try:
        yield unfinished
        if path.exists():
            shutil.copymode(path, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_records(name: str, given: Any, kind: str, fits: Callable[[Tensor], bool]) -> dict[str, list[Tensor]]:
    """Check that each gate has a list of tensors `(s, k)` of the required kind, and return these lists, keyed by
    gate."""
    if not isinstance(given, Mapping):
        raise TypeError(f"expected {name} to be a dict that maps gates to records, but got a {type(given).__name__}")
    found = {gate: list(of) if isinstance(of, Iterable) else [of] for gate, of in given.items()}
    for gate, sequences in found.items():
        for record in sequences:
            if not (isinstance(record, Tensor) and record.ndim == 2 and has_values(record) and fits(record)):
                wanted = f"a list of dense tensors of {kind} (tokens, k), one per sequence"
                raise ValueError(f"expected {name}[{gate!r}] to be {wanted}, but got {record!r:.99}")
    return found


def pack_records(kept: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Copy the records so that all records of a gate are views of one tensor. A saved file therefore contains only one
    tensor per gate."""
    return {name: list(torch.cat(of).split([*map(len, of)])) if of else [] for name, of in kept.items()}


def has_values(array: Tensor) -> bool:
    """Return whether a tensor is dense and not on the meta device."""
    return array.layout is torch.strided and not array.is_meta


def is_integer_tensor(array: Tensor) -> bool:
    """Return whether an array has an integer dtype whose values all fit in int64."""
    return not (array.is_floating_point() or array.is_complex() or array.dtype in (torch.bool, torch.uint64))


def append_forwards(
    name: str, before: list[Tensor], forwards: Iterable[tuple[Tensor, Tensor | None, Tensor | int]]
) -> list[Tensor]:
    """Append forward passes, given as (values, mask, number of earlier tokens), to a gate's records. A forward pass
    either starts new sequences or continues the most recent ones."""
    records = list(before)
    for values, mask, seen in forwards:
        found = values.cpu()
        rows = split_sequences(found, None if mask is None else mask.cpu())
        if starts_sequences(seen):
            records += rows
            continue
        first, read = len(records) - len(rows), previous_lengths(seen, len(rows))
        have = [len(record) for record in records[max(first, 0) :]]
        if first < 0 or any(map(int.__lt__, have, read)):
            raise RuntimeError(
                f"{name!r}: a forward pass continues sequences of {read} tokens, but {have} tokens were recorded"
            )
        for place, row, number in zip(range(first, len(records)), rows, read, strict=True):
            records[place] = torch.cat([records[place][:number], row])  # the cache may have been cropped
    return records


def split_sequences(values: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Split the values `(b, n, k)` of a forward pass into one tensor `(s, k)` per sequence. `mask` is `(b, n)` bool or,
    for packed rows, the sequence index of each token, as in `RecordedForward`."""
    if mask is None or mask.dtype == torch.bool:
        return list(values) if mask is None else [*map(Tensor.__getitem__, values, mask)]
    real, sequence = values[mask >= 0], mask[mask >= 0]
    return list(real[sequence.argsort(stable=True)].split(sequence.bincount().tolist()))


def starts_sequences(seen: Tensor | int) -> bool:
    """Return whether a forward pass with the given number of earlier tokens starts new sequences."""
    return not isinstance(seen, Tensor) and seen == 0


def previous_lengths(seen: Tensor | int, sequences: int) -> list[int]:
    """Return the number of tokens that precede a forward pass in each of its sequences."""
    return seen.tolist() if isinstance(seen, Tensor) else [seen] * sequences


def parse_requests(requests: Sequence[Any]) -> dict[str, list[Tensor]]:
    """Return a list of `(s, k)` tensors for each layer, one per request, keyed by layer number."""
    arrays = [parse_request(number, request) for number, request in enumerate(requests)]
    numbers = [len(layers) for layers in arrays]
    if len(set(numbers)) != 1:
        raise ValueError(
            f"expected requests of shape (tokens, layers, k) with the same number of layers, but got {numbers} layers"
        )
    return {str(i): list(of_gate) for i, of_gate in enumerate(zip(*arrays, strict=True))}


def parse_request(number: int, request: Any) -> tuple[Tensor, ...]:
    """Split a request into one `(s, k)` tensor per layer."""
    try:
        return torch.as_tensor(request).cpu().unbind(1)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        got = f"a {type(request).__name__}: {error}"
        remedy = "; decode it, as docs/replay.md does with SGLang's" if isinstance(request, str) else ""
        raise ValueError(
            f"expected request {number} to be an array of shape (tokens, layers, k), but got {got}{remedy}"
        ) from error


def compact_choices(array: Tensor) -> Tensor:
    """Convert an engine's choices `(s, k)` to int16 if they fit. Rows in which all entries are -1 are replaced so that
    the gate chooses the experts."""
    wide = array.to(torch.int64)
    small = wide.to(torch.int16)
    return torch.where((wide == -1).all(dim=-1, keepdim=True), KEEP_ROUTER_CHOICE, small if small.equal(wide) else wide)
