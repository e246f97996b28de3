"""`examples/elastic.py` by two agents of torchrun on one machine, of which one is killed as a machine dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=2"
TIMEOUT, SAVE_EVERY, STEPS = 20, 20, 64  # seconds that ranks wait for each other; steps
LIMIT = 300.0  # seconds in which the next step has to come
OPTIONS = f"--steps {STEPS} --context 16 --save-every {SAVE_EVERY} --timeout {TIMEOUT}".split()
LINE = re.compile(r"step (\d+) of \d+, (\d+) ranks: loss (\S+)")


class Line(NamedTuple):
    """What the first rank prints after a step."""

    step: int
    ranks: int
    loss: float


class Agent:
    """An agent of torchrun with one rank, and what that rank has printed."""

    def __init__(self, log: Path, port: int, address: str, options: Sequence[str], *, host: bool) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "moe"]
        # both agents are on the machine of the endpoint, so neither can find out alone which of them is the host
        command += ["--rdzv-conf", f"{RENDEZVOUS},is_host={int(host)}", "--local-addr", address]
        command += ["--max-restarts", "1", str(ROOT / "examples" / "elastic.py"), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else no agent can join: docs/distributed/trainers.md
        self.log, self.errors, self.read = log, log.with_suffix(".err"), 0
        with self.log.open("w") as out, self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors)

    def new_lines(self) -> list[Line]:
        """What its rank printed since the last call."""
        text = self.log.read_text()
        new, self.read = text[self.read : text.rfind("\n") + 1], text.rfind("\n") + 1
        return [Line(int(step), int(ranks), float(loss)) for step, ranks, loss in LINE.findall(new)]

    def kill(self) -> None:
        """The agent and its rank, at once."""
        if self.process.poll() is None:
            ranks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for pid in [self.process.pid, *map(int, ranks)]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait()


def lines_of(agents: Sequence[Agent]) -> Iterator[Line]:
    """Lines as they come, until an agent ends or none comes for too long."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ended = any(agent.process.poll() is not None for agent in agents)
        for line in (line for agent in agents for line in agent.new_lines()):
            deadline = time.monotonic() + LIMIT
            yield line
        if ended:
            return
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_node_is_killed_and_the_other_one_goes_on(tmp_path: Path):
    """At most the steps since the last checkpoint are lost. When they are done again, their losses are the same."""
    pytest.importorskip("transformers")
    port, options, agents = free_port(), [*OPTIONS, "--out", str(tmp_path / "saved")], []
    with ExitStack() as stack:
        for address, host in (("127.0.0.1", True), ("127.0.0.2", False)):
            agents.append(Agent(tmp_path / f"{address}.log", port, address, options, host=host))
            stack.callback(agents[-1].kill)
        together = []
        for line in lines_of(agents):
            together.append(line)
            if line.ranks == 2 and line.step >= SAVE_EVERY + 9:
                break
        left, killed = agents
        killed.kill()
        # by `--local-addr` the first rank may be either agent's: what the killed one printed last counts too
        together += killed.new_lines()
        rest = list(lines_of([left]))
        assert left.process.wait(LIMIT) == 0, left.errors.read_text()[-3000:]
    alone = {line.step: line.loss for line in rest if line.ranks == 1}
    before = {line.step: line.loss for line in [*together, *rest] if line.ranks == 2}
    assert before, "the two nodes took no step together"
    assert 0 <= max(before) + 1 - min(alone) <= SAVE_EVERY
    assert max(alone) == STEPS
    again = alone.keys() & before.keys()
    assert len(again) == max(before) + 1 - min(alone)
    assert all(abs(alone[step] - before[step]) < 2e-4 for step in again)
