"""Sweeps: which points there are, what is said of a wrong one, the table and the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tandem.cli import app
from tandem.commands.plots import write_plots
from tandem.core.errors import ConfigError
from tandem.simulator import ClusterSpec, TraceRequest
from tandem.simulator.sweep import Axis, at_rate, parse_axis, run_point, sweep_points, table

MakeSpec = Callable[..., ClusterSpec]
PROFILE = Path(__file__).parents[2] / "docs/profiles/roofline-8b.yaml"
TRACE = [TraceRequest(i * 0.5, 3 + i * 7 % 40, 1 + i * 5 % 9) for i in range(20)]


def test_every_combination_is_a_point_and_the_last_axis_is_the_fastest(make_spec: MakeSpec) -> None:
    axes = [parse_axis("split=0:2,1:1"), parse_axis("chunk=4,32"), parse_axis("policy=deadline")]
    points = sweep_points(make_spec(1, 1), axes)
    assert [point.values[:2] for point in points] == [
        ("0:2", "4"), ("0:2", "32"), ("1:1", "4"), ("1:1", "32"),
    ]  # fmt: skip
    last = points[-1].spec
    assert (last.num_prefill, last.num_decode) == (1, 1)
    assert (last.config.scheduler.chunk_size, last.config.scheduler.max_batch_tokens) == (32, 32)
    assert last.config.scheduler.policy == "deadline"


def test_any_setting_and_a_policy_for_each_role_can_be_swept(make_spec: MakeSpec) -> None:
    axes = [
        parse_axis("scheduler.max_running=2,5"),
        parse_axis("policy=concatenation/chunked_prefill"),
    ]
    first, second = sweep_points(make_spec(1, 1), axes)
    assert (first.spec.config.scheduler.max_running, second.spec.config.scheduler.max_running) == (
        2,
        5,
    )
    assert first.spec.config.scheduler.prefill_policy == "concatenation"
    assert first.spec.config.scheduler.policy == "chunked_prefill"


def test_a_rate_stretches_the_gaps_and_keeps_the_rest() -> None:
    faster = at_rate(TRACE, 8.0)
    assert (len(faster) - 1) / faster[-1].arrival == pytest.approx(8.0)
    assert [r.prompt_len for r in faster] == [r.prompt_len for r in TRACE]
    assert at_rate(TRACE, None) is TRACE
    assert at_rate(TRACE[:1], 8.0) == TRACE[:1], "one request has no gaps"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate", "expected NAME=VALUE"),
        ("rate=", "expected NAME=VALUE"),
        ("speed=1,2", "allowed: rate, split, chunk, policy"),
        ("rate=1,fast", "rate = 'fast': allowed: a number above 0"),
        ("rate=-1", "a number above 0"),
        ("split=3", "expected PREFILL:DECODE"),
        ("split=3:0", "at least one decode worker"),
        ("chunk=0", "scheduler.chunk_size = '0'.*greater than or equal to 1"),
        ("policy=magic", "'magic' is unknown; there are static_batching"),
        ("scheduler.colour=1", "no such setting"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(
    text: str, message: str, make_spec: MakeSpec
) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_points(make_spec(1, 1), [parse_axis(text)])
    with pytest.raises(ConfigError, match="named twice"):
        sweep_points(make_spec(1, 1), [Axis("rate", ("1",)), Axis("rate", ("2",))])


def test_the_same_sweep_gives_the_same_rows_and_the_same_pictures(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    axes = [parse_axis("rate=2,20"), parse_axis("split=0:2,1:1")]
    points, written = sweep_points(make_spec(1, 1), axes), []
    for name in ("one", "two"):
        reports = [run_point(point, TRACE, {"ttft": 0.2}) for point in points]
        rows = table(axes, points, reports)
        png, page = write_plots(tmp_path / name, "a <sweep>", axes, rows)
        assert png.read_bytes().startswith(b"\x89PNG")
        written.append((rows, page.read_text()))
    assert written[0] == written[1]
    rows, page = written[0]
    assert [(row["rate"], row["split"]) for row in rows][1] == ("2", "1:1")
    assert rows[0]["ttft_p99"] < rows[2]["ttft_p99"], "ten times the rate makes a queue"
    assert "a &lt;sweep&gt;" in page
    assert page.count("<tr>") == 1 + len(rows)
    assert "<script" not in page
    assert 'src="' not in page


def test_the_command_prints_a_table_or_json_and_draws(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    lines = ({"arrival": r.arrival, "prompt": r.prompt_len, "output": r.output_len} for r in TRACE)
    trace.write_text("\n".join(map(json.dumps, lines)))
    command = ["simulate", "--trace", str(trace), "--profile", str(PROFILE), "--jobs", "1"]
    sweep = [*command, "--sweep", "rate=1,50", "--plot", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, [*sweep, "--json"])
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)
    assert [row["rate"] for row in rows] == ["1", "50"]
    assert {path.name for path in tmp_path.glob("out.*")} == {"out.png", "out.html"}
    for wrong in (["--plot", "x"], ["--sweep", "rate=1", "--timeline", "x"]):
        assert isinstance(CliRunner().invoke(app, [*command, *wrong]).exception, ConfigError)
