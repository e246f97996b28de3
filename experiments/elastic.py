"""Kills nodes of a running training and lets others join: how many steps are lost, and how long until it goes on.

    python -m experiments.elastic            # three kills and three joins, then the same run undisturbed; a table
    python -m experiments.elastic --kills 1

It runs `examples/elastic.py` by two agents of torchrun on one machine, each with one rank, on gloo. The agent that does
not host the rendezvous is killed with its rank, at once, as a machine dies. The other one has to go on alone. Then a
new agent joins. In the end the weights are compared with those of one process that nobody disturbed.
"""

import argparse
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from checkpoints import checkpoints

from .language_model.report import format_rows

ROOT = Path(__file__).parent.parent
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=2"
TIMEOUT, SAVE_EVERY = 20, 20  # seconds that ranks wait for one another; steps
LIMIT = 300.0  # seconds in which something has to happen
LINE = re.compile(r"step (\d+) of \d+, (\d+) ranks: loss (\S+)")


class Line(NamedTuple):
    """What the first rank prints after a step."""

    step: int
    ranks: int
    loss: float


class Agent:
    """An agent of torchrun with one rank; its address decides which agent has the first rank."""

    def __init__(self, log: Path, port: int, address: str, options: Sequence[str], *, kills: int, host: bool) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "moe"]
        # who is host has to be said, as both agents are on the machine of the endpoint
        command += ["--rdzv-conf", f"{RENDEZVOUS},is_host={int(host)}", "--local-addr", address]
        command += ["--max-restarts", str(kills), str(ROOT / "examples" / "elastic.py"), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else no agent can join: docs/engines.md
        self.log, self.errors, self.read = log, log.with_suffix(".err"), 0
        with self.log.open("w") as out, self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors)

    def lines(self) -> list[Line]:
        """What its rank printed since the last call."""
        text = self.log.read_text()
        new, self.read = text[self.read : text.rfind("\n") + 1], text.rfind("\n") + 1
        return [Line(int(step), int(ranks), float(loss)) for step, ranks, loss in LINE.findall(new)]

    def kill(self) -> None:
        """The agent and its ranks."""
        if self.process.poll() is None:
            ranks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for pid in [self.process.pid, *map(int, ranks)]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait()


class Run:
    """A training by agents that come and go."""

    def __init__(self, out: Path, options: Sequence[str], kills: int, addresses: Sequence[str]) -> None:
        self.out, self.options, self.kills, self.addresses = out, options, kills, addresses
        self.port = free_port()
        self.agents: list[Agent] = []
        self.started = 0
        self.new = self._lines()
        self.seen = [Line(0, 0, 0.0)]
        out.mkdir(parents=True)

    def start(self) -> None:
        log, host = self.out / f"agent{self.started}.log", self.started == 0
        options = [*self.options, "--out", str(self.out / "saved")]
        address = self.addresses[not host]
        self.agents.append(Agent(log, self.port, address, options, kills=self.kills, host=host))
        self.started += 1

    def kill(self) -> None:
        agent = self.agents.pop()
        agent.kill()
        self.seen.extend(agent.lines())

    def _lines(self) -> Iterator[Line]:
        while True:
            for agent in list(self.agents):
                yield from agent.lines()
            if any(agent.process.poll() is not None for agent in self.agents):
                return
            time.sleep(0.02)

    def wait(self, what: str, until: Callable[[Line], bool]) -> int:
        """Wait for a line; returns the step before it."""
        deadline = time.monotonic() + LIMIT
        for line in self.new:
            self.seen.append(line)
            if until(line):
                return self.seen[-2].step
            if time.monotonic() > deadline:
                break
        raise SystemExit(
            f"{what} did not happen in {LIMIT} s, or the run ended: give more --steps. {self.out} has logs"
        )

    def change(self, what: str) -> dict[str, Any]:
        """Do what changes the number of ranks, and wait for a step by the new ones; return what it cost."""
        act, ranks = {"kill": (self.kill, 1), "join": (self.start, 2)}[what]
        begin = time.monotonic()
        act()
        before = self.wait(f"a step after a {what}", lambda line: line.ranks == ranks)
        seconds, lost = time.monotonic() - begin, before + 1 - self.seen[-1].step
        if not 0 <= lost <= SAVE_EVERY:
            raise SystemExit(f"{lost} steps lost by a {what}, with a checkpoint every {SAVE_EVERY}")
        return {"what": what, "ranks": ranks, "after step": before, "steps lost": lost, "seconds": f"{seconds:.1f}"}

    def disturb(self, draw: random.Random, changes: Sequence[str]) -> list[dict[str, Any]]:
        """Start two agents, then "kill" and "join" at random steps; runs to the end."""
        try:
            return self._disturb(draw, changes)
        finally:
            while self.agents:
                self.kill()

    def _disturb(self, draw: random.Random, changes: Sequence[str]) -> list[dict[str, Any]]:
        self.start()
        self.start()
        self.wait("a step of two ranks", lambda line: line.ranks == 2)
        rows = []
        for what in changes:
            goal = self.seen[-1].step + draw.randint(SAVE_EVERY, 2 * SAVE_EVERY)
            self.wait(f"step {goal}", lambda line, goal=goal: line.step >= goal)
            rows.append(self.change(what))
            print(rows[-1], flush=True)
        for agent in self.agents:
            if agent.process.wait(LIMIT):
                raise SystemExit(agent.errors.read_text()[-3000:])
        self.seen.extend(self.new)
        return rows


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def undisturbed(out: Path, options: Sequence[str]) -> None:
    """The same training in one process."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    alone |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "elastic.py"), *options, "--out", str(out / "saved")]
    subprocess.run(command, env={**os.environ, **alone}, check=True, stdout=subprocess.DEVNULL)


def largest_difference(one: Path, other: Path) -> float:
    """Of all weights in the last checkpoints of two runs."""
    models = []
    for run in (one, other):
        dcp_to_torch_save(checkpoints(run / "saved")[-1], run / "whole.pt")
        models.append(torch.load(run / "whole.pt", weights_only=True)["model"])
    return max((models[0][name] - models[1][name]).abs().max().item() for name in models[0])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument(
        "--addresses", nargs=2, default=["127.0.0.1", "127.0.0.2"], help="of the host, and of the other"
    )
    parser.add_argument("--out", type=Path, help="a new folder for logs and checkpoints; by default a temporary one")
    args = parser.parse_args(argv)
    options = ["--steps", str(args.steps), "--save-every", str(SAVE_EVERY), "--timeout", str(TIMEOUT)]
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary) / "elastic"
        run = Run(out / "disturbed", options, args.kills, args.addresses)
        rows = run.disturb(random.Random(0), ("kill", "join") * args.kills)
        undisturbed(out / "alone", options)
        print(format_rows([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]))
        print(f"largest difference of a weight: {largest_difference(out / 'disturbed', out / 'alone'):.1e}")


if __name__ == "__main__":
    main()
