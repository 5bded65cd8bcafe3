"""`make bench-micro`: every CPU kernel against its bound, the engine against the reference.

Prints markdown tables, each line as it is measured. Nothing but the engine is measured: no cluster,
no network. The model is the random-weight Qwen2.5-0.5B shape; implementations take turns, so that a
busy machine hits both. About two and a half minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.micro_operations import (
    Bounds,
    Measured,
    Shape,
    measure_bounds,
    measure_operations,
)
from benchmarks.models import qwen_shaped_model
from tandem_kernels import implementation

BATCHES = (1, 8, 32)
STEPS = 16
REPEATS = 8
OPERATIONS_HEAD = (
    "| operation | ms | of the bound | torch ms | × torch |",
    "|---|--:|--:|--:|--:|",
)


@dataclass(frozen=True)
class Choice:
    """One implementation of the engine to be measured."""

    name: str
    environment: dict[str, str]
    threads: int
    batches: tuple[int, ...]
    runs: int

    @property
    def label(self) -> str:
        """How its line begins."""
        return f"{self.threads}, {self.name}"


def operation_line(row: Measured) -> str:
    """Return a line of the table: time, part of the bound, and times faster than torch."""
    reference = row.reference_seconds
    theirs = "" if reference is None else f"{reference * 1e3:.3f}"
    ratio = "" if reference is None else f"{reference / row.seconds:.1f}"
    bound = row.bound_seconds / row.seconds
    return f"| {row.name} | {row.seconds * 1e3:.3f} | {bound:.0%} | {theirs} | {ratio} |"


def bounds_line(bounds: Bounds, threads: int) -> str:
    """Say what the bounds are."""
    return (
        f"{implementation('cpu')}, {threads} threads; memory {bounds.read_bytes / 1e9:.0f} GB/s, "
        f"torch bfloat16 GEMM {bounds.gemm_flops / 1e9:.0f} GFLOP/s"
    )


def engine_table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of a table from the runs of each implementation, by threads and name."""
    columns = ["prefill", *(f"batch {count}" for count in BATCHES)]
    lines = [
        "| threads, choice | kernels | " + " | ".join(columns) + " |",
        "|---|---|" + "--:|" * len(columns),
    ]
    for name, results in runs.items():
        figures = [_middle([run["prefill"] for run in results])]
        figures += [_middle([run["decode"].get(str(size)) for run in results]) for size in BATCHES]
        lines.append(f"| {name} | {results[0]['kernels']} | {' | '.join(figures)} |")
    return lines


def _middle(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{median(known):.{1 if median(known) < 100 else 0}f}"


def engine_choices(threads: list[int], runs: int) -> list[Choice]:
    """Return what is measured: ours on every number of threads, the slow reference once."""
    ours = [Choice("ours", {}, count, BATCHES, runs) for count in threads]
    reference = {"TANDEM_KERNELS": "reference"}
    return [*ours, Choice("reference", reference, max(threads), BATCHES[:2], 1)]


def run_engine(
    model: Path,
    dtype: str,
    choice: Choice,
    *,
    prompt: int = 1024,
    context: int = 128,
    steps: int = STEPS,
) -> Any:
    """Measure one engine in a process of its own; `prompt` and `context` in tokens."""
    sizes = map(str, (prompt, context, steps, *choice.batches))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.micro_engine"),
            *(str(model), str(choice.threads), dtype, *sizes),
        ],
        env={**os.environ, **choice.environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU kernels and engine against their bounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2, help="runs of our engine")
    parser.add_argument("--model", type=Path, help="a model directory; default: the random one")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']}\n")
    for threads in options.threads:
        torch.set_num_threads(threads)
        bounds = measure_bounds(REPEATS)
        print(bounds_line(bounds, threads), "", *OPERATIONS_HEAD, sep="\n", flush=True)
        for measured in measure_operations(Shape(), bounds, REPEATS):
            print(operation_line(measured), flush=True)
        print()
    model = options.model or qwen_shaped_model()
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.repeats):
        for choice in engine_choices(options.threads, options.repeats):
            if number < choice.runs:
                print(f"engine on threads, kernels: {choice.label}", file=sys.stderr, flush=True)
                result = run_engine(model, options.dtype, choice)
                runs.setdefault(choice.label, []).append(result)
    print("Tokens per second, context 128:\n")
    print("\n".join(engine_table(runs)))


if __name__ == "__main__":
    main()
