"""`make bench-peers`: Tandem and other engines on one machine, in turn, with one table and plot.

Each engine starts once per model and has its turns, warmed up before each; between them it is
frozen. The order of a round begins with another engine each time, so that what disturbs the machine
disturbs all alike. Results are kept in benchmarks/measured/peers.json and shown by
docs/performance.md; engines that are not measured this time keep their rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.client import LoadError
from benchmarks.foreign import foreign_load
from benchmarks.launch import ClusterError
from benchmarks.machine import describe_machine
from benchmarks.micro_operations import measure_bounds
from benchmarks.models import llama_shaped_model, qwen_shaped_model
from benchmarks.options import some_of
from benchmarks.peers.cases import LLAMA, MODELS, QWEN, Case, ModelCases
from benchmarks.peers.environments import UnavailableError
from benchmarks.peers.page import update_pages
from benchmarks.peers.peers import PEERS_IN_TURN, Peer
from benchmarks.peers.sessions import Session
from benchmarks.results import MEASURED, merge, read_results, write_results
from benchmarks.servers import raise_on_signals
from tandem.modelfiles import read_json
from tandem.profiler.machine import today

RESULTS = MEASURED / "peers.json"
CORES = 2
CEILING_REPEATS = 5
EXPECTED = "about 20 minutes on two cores once everything is installed"
Failure = (UnavailableError, ClusterError, LoadError)


class Table:
    """One model's engines and what has been measured of them in this run."""

    def __init__(self, cases: ModelCases, model: Path, cores: Sequence[int]) -> None:
        self.cases = cases
        self.model = model
        self.cores = cores
        self.vocab_size: int = read_json(model, "config.json")["vocab_size"]
        self.rows: dict[str, dict[str, Any]] = {}
        self._sessions: dict[str, Session] = {}

    def turn(self, peer: Peer, number: int, stack: ExitStack) -> None:
        """Give one engine one turn; a failure becomes its row."""
        row = self.rows.setdefault(
            peer.key, {"name": peer.name, "how": peer.how, "date": today(), "runs": []}
        )
        if "unavailable" in row:
            return
        started = time.monotonic()
        print(f"{self.cases.key}, round {number + 1}: {peer.name} ", end="", flush=True)
        try:
            with self._awake(peer, stack) as session:
                row["version"] = session.description
                row["runs"].append(self._measure(session, number))
        except Failure as error:
            row["unavailable"] = str(error).partition("\n")[0]
            print(f"- {error}", flush=True)
            return
        figures = {key: round(row["runs"][-1][key]) for key in (c.key for c in self.cases.cases)}
        print(f"{figures} ({time.monotonic() - started:.0f} s)", flush=True)

    @contextmanager
    def _awake(self, peer: Peer, stack: ExitStack) -> Iterator[Session]:
        """Yield the engine, started and warm; leave it frozen, or stopped if it cannot be."""
        if not peer.lasts:
            with peer.open(self.model, self.cores) as session:
                self._warm_up(session)
                yield session
            return
        session = self._sessions.get(peer.key) or stack.enter_context(
            peer.open(self.model, self.cores)
        )
        if peer.key in self._sessions:
            session.thaw()
        self._sessions[peer.key] = session
        self._warm_up(session)  # after a pause too: others have had the caches meanwhile
        yield session
        session.freeze()

    def _warm_up(self, session: Session) -> None:
        """Run every size once, with few tokens, from prompts that no turn has."""
        for case in self.cases.cases:
            session.generate(case.prompts(self.vocab_size, -1), min(case.new_tokens, 4))

    def _measure(self, session: Session, number: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        with foreign_load() as load:
            for case in self.cases.cases:
                speeds = (
                    _speed(session, case, case.prompts(self.vocab_size, number, time))
                    for time in range(self.cases.times)
                )
                figures[case.key] = median(speeds)
        return {**{key: round(value, 2) for key, value in figures.items()}, **load.as_json()}


def _speed(session: Session, case: Case, prompts: list[list[int]]) -> float:
    try:
        return case.speed(session.generate(prompts, case.new_tokens))
    except ValueError as error:
        raise LoadError(f"{case.title}: {error}") from error


def measure_model(
    cases: ModelCases, peers: Sequence[Peer], runs: int, cores: Sequence[int]
) -> dict[str, Any]:
    """Measure one model; returns its rows and, under "ceilings", the machine's bounds."""
    model = qwen_shaped_model() if cases is QWEN else llama_shaped_model()
    table, ceilings = Table(cases, model, cores), []
    with ExitStack() as stack:
        for number in range(runs):
            bounds = measure_bounds(CEILING_REPEATS)
            ceilings.append({"read_bytes": bounds.read_bytes, "gemm_flops": bounds.gemm_flops})
            first = number % len(peers)
            for peer in (*peers[first:], *peers[:first]):
                table.turn(peer, number, stack)
    return {**table.rows, "ceilings": {"date": today(), "runs": ceilings}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, keep and show; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.show:
        update_pages(read_results(RESULTS))
        return 0
    raise_on_signals()
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    peers = [peer for peer in PEERS_IN_TURN if not options.only or peer.key in options.only]
    print(f"{len(peers)} engines, {options.runs} rounds each: {EXPECTED}", flush=True)
    try:
        for cases in MODELS:
            if options.models and cases.key not in options.models:
                continue
            rows = measure_model(cases, peers, options.runs, cores)
            stored = read_results(RESULTS)
            fresh = {cases.key: rows, "machine": describe_machine()}
            write_results(RESULTS, merge(stored, fresh))
    except KeyboardInterrupt:
        print("\ninterrupted; every engine is stopped", file=sys.stderr)
        return 130
    update_pages(read_results(RESULTS))
    print(f"figures: {RESULTS}; shown by docs/performance.md and README.md")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.run", description=__doc__)
    add = parser.add_argument
    keys = ", ".join(peer.key for peer in PEERS_IN_TURN)
    add(
        "--only",
        type=some_of([p.key for p in PEERS_IN_TURN]),
        metavar="A,B",
        help=f"engines to measure: {keys}",
    )
    add(
        "--models",
        type=some_of([m.key for m in MODELS]),
        metavar="A,B",
        help=f"models: {QWEN.key}, {LLAMA.key}",
    )
    add("--runs", type=int, default=3, help="turns of each engine; figures are their medians")
    add("--show", action="store_true", help="only write the pages again from what is stored")
    return parser


if __name__ == "__main__":
    sys.exit(main())
