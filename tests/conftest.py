"""Options and fixtures of the whole suite; its marks are in pyproject.toml."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.compat_table import Table, limit  # noqa: F401  (a fixture is found where it is named)
from support.parallel_workers import Workers

collect_ignore = ["guards", "support"]  # commands and helpers, which have no tests

torch.set_num_threads(1)  # tests run many small operators, for which a second thread only waits
if not any(backend.is_available() for backend in (torch.cuda, torch.mtia, torch.xpu)):
    # torch's function records a stack trace for each missing device type: 0.7 ms per call, and tests make 20,000 calls
    torch.manual_seed = torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def reset_state() -> Iterator[None]:
    """Every test starts from the same seed, and leaves torch's threads and default dtype as they were."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone, which FSDP2 needs."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dozen small files of real text, for the language model of the experiments."""
    folder = tmp_path_factory.mktemp("text")
    source = (Path(__file__).parent.parent / "experiments" / "language_model" / "training.py").read_bytes()
    for i in range(12):
        (folder / f"part{i}.txt").write_bytes(source[i * 500 : (i + 1) * 500])
    return [folder / f"part{i}.txt" for i in range(12)]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Processes that are started for the first test of a module and end with its last one."""
    started = Workers()
    yield started
    started.stop()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write tests/compat/table.md from what the tests show")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table(config.getoption("--write-table")))
