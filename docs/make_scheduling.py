"""Draws the pictures of docs/scheduling.md and computes its tables, from runs of the simulator.

    python docs/make_scheduling.py                      # the pictures
    python docs/make_scheduling.py --azure AZURE.csv --mooncake CONVERSATION.jsonl    # and tables

The pictures show the same four requests under every policy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tandem.core.config import TandemConfig
from tandem.scheduler.policies import POLICIES
from tandem.simulator import ClusterSpec, Profile, TraceRequest, load_profile, read_trace, simulate
from tandem.timeline.events import Timeline
from tandem.timeline.picture import render_svg

DOCS = Path(__file__).parent
PICTURES = DOCS / "images/scheduling"
PAGE = DOCS / "scheduling.md"

REQUESTS = [
    TraceRequest(0.0000, 60, 26, tenant="red"),
    TraceRequest(0.1240, 200, 5, tenant="red", priority=-10, ttft_objective=1.0),
    TraceRequest(0.1250, 30, 5, tenant="red", priority=10, ttft_objective=0.6),
    TraceRequest(0.1260, 90, 5, tenant="blue", ttft_objective=0.2),
]
"""r0 decodes when three prompts come together: r1 is long and premium, r2 short and of the batch
class, r3 of another tenant and in a hurry."""
SCHEDULER = {
    "max_batch_tokens": 128,
    "chunk_size": 64,
    "batch_size": 3,
    "batch_wait": 0.03,
    "decode_streak": 3,
    "auto_chunk_ratio": 2.0,
    "itl_objective": 0.04,
    "ageing": 1.0,
}
MACHINE = Profile.model_validate(
    {
        "name": "example",
        "source": "round figures for pictures",
        "iteration": {"fixed": 0.008, "prompt_token": 0.00025, "decode": 0.001, "context": 0},
        "link": {"bytes_per_second": 1e7, "kv_bytes_per_token": 1000, "layer_groups": 4},
        "rpc_seconds": 0.001,
        "num_blocks": 100,
        "max_model_len": 1000,
    }
)
FROM, SECONDS = 0.09, 0.27


class Comparison(NamedTuple):
    """One table: all policies on a part of a trace."""

    requests: int
    speed: float
    slo: dict[str, float]


COMPARISONS = {
    "azure": Comparison(6000, 4.0, {"ttft": 1.0, "tpot": 0.03, "itl": 0.2}),
    "mooncake": Comparison(200, 0.6, {"ttft": 4.0, "tpot": 0.05, "itl": 0.3}),
}
SPLITS = ((0, 2), (1, 1))


def pictures() -> Iterator[tuple[str, str]]:
    """Yield every picture: its name and the SVG."""
    for name in POLICIES:
        yield name, _picture(name, num_prefill=0)
    yield "separate_pools", _picture("chunked_prefill", num_prefill=1)
    yield "fair_share_service", _service_plot()
    for mode in ("threshold", "measured"):
        yield f"lending_{mode}", _lending(mode)


LENDING_REQUESTS = [
    TraceRequest(at, prompt, 8)
    for at, prompt in ((3.00, 300), (3.01, 240), (3.02, 260), (3.03, 60))
]
"""Four prompts that come together, after enough others for the workers to know what they cost."""


def _lending(mode: str) -> str:
    """One prefill and one decode worker, with and without lending."""
    config = TandemConfig.model_validate(
        {
            "scheduler": {**SCHEDULER, "itl_objective": 0.05},
            "worker": {"local_prefill_max_tokens": 8},
            "lending": {"mode": mode},
        }
    )
    warm_up = [TraceRequest(0.2 * i, 40, 3) for i in range(12)]
    running = [TraceRequest(2.6, 20, 60), TraceRequest(2.7, 20, 60)]
    machine = MACHINE.model_copy(update={"num_blocks": 400})
    recorder = Timeline()
    requests = [*warm_up, *running, *LENDING_REQUESTS]
    simulate(requests, ClusterSpec(machine, config, 1, 1), {}, recorder)
    return render_svg(recorder, ["prefill-0", "decode-0"], seconds=0.45, start=2.97)


def _picture(policy: str, num_prefill: int) -> str:
    config = TandemConfig.model_validate(
        {
            "scheduler": {**SCHEDULER, "policy": policy},
            "worker": {"local_prefill_max_tokens": 8},
            "lending": {"mode": "threshold"},
        }
    )
    recorder = Timeline()
    spec = ClusterSpec(MACHINE, config, num_prefill, 1)
    requests = REQUESTS
    if policy != "priority_classes":  # every policy heeds priorities; only this one lets them age
        requests = [request._replace(priority=0) for request in REQUESTS]
    simulate(requests, spec, {}, recorder)
    workers = ["prefill-0"] * num_prefill + ["decode-0"]
    return render_svg(recorder, workers, seconds=SECONDS, start=FROM)


def service(policy: str) -> dict[str, list[tuple[float, float]]]:
    """Return each tenant's service over time: prompt tokens plus twice the output tokens.

    One tenant floods one worker with everything at once; the other always has requests waiting.
    """
    trace = [TraceRequest(0.0, 40 + 7 * i % 60, 12, tenant="flood") for i in range(60)]
    trace += [TraceRequest(0.5, 20 + 11 * i % 50, 8, tenant="quiet") for i in range(24)]
    config = TandemConfig.model_validate(
        {"scheduler": {**SCHEDULER, "policy": policy, "max_running": 6}}
    )
    recorder = Timeline()
    simulate(trace, ClusterSpec(MACHINE, config, 0, 1), {}, recorder)
    served: dict[str, list[tuple[float, float]]] = {"flood": [(0.0, 0.0)], "quiet": [(0.0, 0.0)]}
    for box in recorder.iterations:
        for tenant, points in served.items():
            mine = [p for p in box.parts if trace[int(p.request[1:])].tenant == tenant]
            tokens = sum(2 if part.length == 1 else part.length for part in mine)
            points.append((box.ended, points[-1][1] + tokens))
    return served


def _service_plot() -> str:
    """Two panels: first come, first served, and fair share."""
    panels, width, height, left = [], 440, 220, 50
    for index, policy in enumerate(("chunked_prefill", "fair_share")):
        served = service(policy)
        seconds = served["flood"][-1][0]
        most = max(points[-1][1] for points in served.values())
        x0 = index * width + left
        panels.append(f'<text x="{x0}" y="18" font-weight="600">{policy}</text>')
        panels.append(f'<path d="M{x0} 30V{height - 24}H{x0 + width - left - 16}" {_THIN}/>')
        for (tenant, points), colour in zip(served.items(), ("#4e79a7", "#e15759"), strict=True):
            steps = " ".join(
                f"{x0 + time / seconds * (width - left - 16):.1f},"
                f"{height - 24 - total / most * (height - 54):.1f}"
                for time, total in points
            )
            panels.append(f'<polyline points="{steps}" fill="none" stroke="{colour}" {_THICK}/>')
            x, y = steps.rpartition(" ")[2].split(",")
            panels.append(f'<text x="{x}" y="{float(y) - 6:.1f}" {_END} fill="{colour}">'
                          f"{tenant} {points[-1][1]:.0f}</text>")  # fmt: skip
        panels.append(f'<text x="{x0 + width - left - 16}" y="{height - 8}" {_END}>'
                      f"{seconds:.1f} s</text>")  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {height}" '
        f'font-family="system-ui,sans-serif" font-size="11">{"".join(panels)}</svg>\n'
    )


_THIN, _THICK, _END = 'fill="none" stroke="#999"', 'stroke-width="2"', 'text-anchor="end"'


def table(trace: list[TraceRequest], slo: dict[str, float]) -> str:
    """Return the comparison of all policies, as Markdown."""
    head = "TTFT p50 / p99 s | TPOT p50 / p99 ms | longest gap p99 ms | objectives met"
    lines = [f"| policy | colocated: {head} | separate: {head} |", "|---" * 9 + "|"]
    rows = [(policy, trace, slo) for policy in POLICIES]
    with ProcessPoolExecutor() as executor:
        for line in executor.map(_row, rows):
            print(line, flush=True)
            lines.append(line)
    return "\n".join(lines) + "\n"


def _row(job: tuple[str, list[TraceRequest], dict[str, float]]) -> str:
    """One policy, colocated and in separate pools."""
    policy, trace, slo = job
    profile, cells = load_profile(DOCS / "profiles/roofline-8b.yaml"), [f"`{policy}`"]
    config = TandemConfig.model_validate(
        {
            "scheduler": {
                "policy": policy,
                "max_batch_tokens": 2048,
                "chunk_size": 512,
                "batch_size": 32,
                "ttft_objective": slo["ttft"],
                "itl_objective": slo["tpot"],
            },
            "lending": {"mode": "threshold"},
        }
    )
    for num_prefill, num_decode in SPLITS:
        spec = ClusterSpec(profile, config, num_prefill, num_decode)
        cells += _cells(simulate(trace, spec, slo).summary())
    return "| " + " | ".join(cells) + " |"


def _cells(summary: dict[str, Any]) -> list[str]:
    ttft, tpot = summary["ttft"], summary["tpot"]
    return [
        f"{ttft['p50']:.2f} / {ttft['p99']:.2f}",
        f"{tpot['p50'] * 1e3:.0f} / {tpot['p99'] * 1e3:.0f}",
        f"{summary['longest_gap']['p99'] * 1e3:.0f}",
        f"{summary['slo_met']:.1%}",
    ]


def main() -> None:
    """Write the pictures and, given a trace, the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in COMPARISONS:
        parser.add_argument(f"--{name}", type=Path, help="the conversation trace of that name")
    arguments = parser.parse_args()
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, svg in pictures():
        (PICTURES / f"{name}.svg").write_text(svg, encoding="utf-8")
    for name, comparison in COMPARISONS.items():
        path: Path | None = getattr(arguments, name)
        if path is not None:
            trace = read_trace(path, comparison.requests, comparison.speed)
            rows, page = table(trace, comparison.slo), PAGE.read_text(encoding="utf-8")
            before, mark, rest = page.partition(f"<!-- {name} -->\n")
            _, end, after = rest.partition(f"<!-- /{name} -->")
            if not (mark and end):
                raise SystemExit(f"{PAGE}: no place for the table <!-- {name} -->")
            PAGE.write_text(before + mark + rows + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
