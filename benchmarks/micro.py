"""`make bench-micro`: every CPU kernel against its bound, the engine against the reference.

Prints two markdown tables. Nothing but the engine is measured: no cluster, no network. The model is
the random-weight Qwen2.5-0.5B shape; implementations take turns, so that a busy machine hits both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
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
IMPLEMENTATIONS = {"ours": {}, "reference": {"TANDEM_KERNELS": "reference"}}


def operations_table(measured: list[Measured]) -> list[str]:
    """Return the lines of a table: time, part of the bound, and times faster than torch."""
    lines = ["| operation | ms | of the bound | torch ms | × torch |", "|---|--:|--:|--:|--:|"]
    for row in measured:
        reference = row.reference_seconds
        theirs = "" if reference is None else f"{reference * 1e3:.3f}"
        ratio = "" if reference is None else f"{reference / row.seconds:.1f}"
        bound = row.bound_seconds / row.seconds
        lines.append(f"| {row.name} | {row.seconds * 1e3:.3f} | {bound:.0%} | {theirs} | {ratio} |")
    return lines


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
        figures = [median(run["prefill"] for run in results)]
        figures += [median(run["decode"][str(count)] for run in results) for count in BATCHES]
        shown = " | ".join(f"{figure:.{1 if figure < 100 else 0}f}" for figure in figures)
        lines.append(f"| {name} | {results[0]['kernels']} | {shown} |")
    return lines


def run_engine(model: Path, threads: int, dtype: str, environment: dict[str, str]) -> Any:
    """Measure one engine in a process of its own."""
    sizes = ["1024", "128", "16", *map(str, BATCHES)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.micro_engine", str(model), str(threads), dtype, *sizes],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU kernels and engine against their bounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each engine")
    parser.add_argument("--model", type=Path, help="a model directory; default: the random one")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']}\n")
    for threads in options.threads:
        torch.set_num_threads(threads)
        bounds = measure_bounds(10)
        print(bounds_line(bounds, threads) + "\n")
        print("\n".join(operations_table(measure_operations(Shape(), bounds, 10))) + "\n")
    model = options.model or qwen_shaped_model()
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for threads in options.threads:
            for name, environment in IMPLEMENTATIONS.items():
                result = run_engine(model, threads, options.dtype, environment)
                runs.setdefault(f"{threads}, {name}", []).append(result)
    print("Tokens per second, context 128:\n")
    print("\n".join(engine_table(runs)))


if __name__ == "__main__":
    main()
