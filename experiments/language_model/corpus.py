"""Text for a byte-level language model: converts files to windows of bytes.

The default text is the source code of the standard library, which every machine with Python has.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Not part of the text: installed packages, tests (which some systems omit), character tables.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
)
HELD_OUT_SHARE = 0.1
END_OF_FILE = b"\0"


@dataclass(frozen=True)
class Corpus:
    """The text of the training files and of the held-out files, each as a uint8 tensor of shape (bytes,)."""

    train: Tensor
    held_out: Tensor
    num_train_files: int
    num_held_out_files: int

    @property
    def digest(self) -> str:
        """A short hash that identifies this text and split."""
        digest = hashlib.sha256(self.train.numpy().tobytes())
        digest.update(self.held_out.numpy().tobytes())
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        return (
            f"{self.train.numel():,} bytes in {self.num_train_files} training files, "
            f"{self.held_out.numel():,} bytes in {self.num_held_out_files} held-out files"
        )


def standard_library_files() -> list[tuple[str, bytes]]:
    """Return the name and content of each Python file in the standard library, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1])]
    return sorted((path.relative_to(root).as_posix(), path.read_bytes()) for path in paths)


def user_files(paths: Iterable[Path]) -> list[tuple[str, bytes]]:
    """Return the name and content of each given file, sorted by name."""
    return sorted((path.name, path.read_bytes()) for path in paths)


def split_files(files: Sequence[tuple[str, bytes]]) -> Corpus:
    """Split files into training and held-out files by a hash of their names, without random numbers.

    About a tenth of the files are held out, at least one and never all. If there is only one file, its last tenth is
    held out instead.
    """
    if len(files) == 1:
        content = files[0][1]
        cut = round(len(content) * (1 - HELD_OUT_SHARE))
        return Corpus(_to_tensor([content[:cut]]), _to_tensor([content[cut:]]), 1, 1)
    by_hash = sorted(files, key=lambda file: (_hash_share(file[0]), file[0]))
    count = sum(_hash_share(name) < HELD_OUT_SHARE for name, _ in files)
    count = max(1, min(count, len(files) - 1))
    held_out, train = sorted(by_hash[:count]), sorted(by_hash[count:])
    return Corpus(
        _to_tensor(content for _, content in train),
        _to_tensor(content for _, content in held_out),
        len(train),
        len(held_out),
    )


def load_corpus(paths: Sequence[Path] = ()) -> Corpus:
    """Load the given files, or by default the standard library."""
    return split_files(user_files(paths) if paths else standard_library_files())


def held_out_windows(text: Tensor, context: int, count: int) -> Tensor:
    """Return `count` evenly spaced windows of `text` as (count, context + 1) int64. They are always the same."""
    _check_length(text, context)
    last = text.numel() - (context + 1)
    starts = torch.linspace(0, last, min(count, last + 1), dtype=torch.float64).long()
    return _cut_windows(text, starts, context)


class Batches:
    """Training windows in random order, each once per epoch. `next()` returns (batch_size, context + 1) int64.

    The order depends only on the seed. `position` is the number of windows returned so far. To continue where another
    run stopped, set `position` to that run's value.
    """

    def __init__(self, text: Tensor, context: int, batch_size: int, seed: int):
        _check_length(text, context)
        self.text, self.context, self.batch_size, self.seed = text, context, batch_size, seed
        num_windows = text.numel() // (context + 1)
        if num_windows < batch_size:
            raise ValueError(
                f"the training text has {num_windows} windows of {context + 1} bytes, fewer than one batch of "
                f"{batch_size}: use more text, a smaller batch or a shorter context"
            )
        self.windows_per_epoch = num_windows // batch_size * batch_size  # omits an incomplete last batch
        self.position = 0
        self._epoch, self._starts = -1, torch.empty(0)

    def next(self) -> Tensor:
        epoch, index = divmod(self.position, self.windows_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._starts = epoch, self._shuffled_starts(epoch)
        self.position += self.batch_size
        return _cut_windows(self.text, self._starts[index : index + self.batch_size], self.context)

    def _shuffled_starts(self, epoch: int) -> Tensor:
        """Return the start of each window in random order. The offset of the windows differs between epochs."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        length = self.context + 1
        spare = self.text.numel() - self.windows_per_epoch * length
        offset = torch.randint(min(spare + 1, length), (), generator=generator)
        return torch.randperm(self.windows_per_epoch, generator=generator) * length + offset


def _hash_share(name: str) -> float:
    """Return a number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def _to_tensor(contents: Iterable[bytes]) -> Tensor:
    """Concatenate the files, with a zero byte after each."""
    text = bytearray()
    for content in contents:
        text += content + END_OF_FILE
    return torch.frombuffer(text, dtype=torch.uint8)


def _cut_windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    return text[starts[:, None] + torch.arange(context + 1)].long()


def _check_length(text: Tensor, context: int) -> None:
    if text.numel() <= context:
        raise ValueError(f"a text of {text.numel()} bytes is shorter than one window of {context + 1}: use more text")
