"""The parts of the simulator: traces, profiles, links, histograms, pictures, the command."""

from __future__ import annotations

import json
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from tandem.cli import app
from tandem.core.errors import ConfigError
from tandem.simulator import TraceRequest, load_profile, read_trace, simulate
from tandem.simulator.clock import Clock
from tandem.simulator.gateway import block_hashes
from tandem.simulator.links import Links
from tandem.simulator.profile import LinkCost, Profile
from tandem.simulator.report import Histogram, percentiles
from tandem.timeline.events import Timeline
from tandem.timeline.picture import render_svg

PROFILE = Path(__file__).parents[2] / "docs/profiles/roofline-8b.yaml"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51,12,0
"""
MOONCAKE = """{"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}
{"timestamp": 500, "input_length": 512, "output_length": 9, "hash_ids": [0]}
"""
OWN = """{"arrival": 3, "prompt": 5, "output": 2, "tenant": "acme", "priority": -1}

{"arrival": 4.5, "prompt": 6, "output": 1, "ttft_objective": 0.5, "itl_objective": 0.1}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_azure_traces(tmp_path: Path) -> None:
    first, second, third = read_trace(write(tmp_path / "a.csv", AZURE))
    assert first == TraceRequest(0.0, 374, 44)
    assert second.arrival == pytest.approx(4.314579, abs=1e-5)
    assert (second.prompt_len, second.output_len) == (396, 109)
    assert third.output_len == 1, "a request that generated nothing still makes its first token"


def test_mooncake_traces_are_sorted_and_keep_their_hashes(tmp_path: Path) -> None:
    first, second = read_trace(write(tmp_path / "m.jsonl", MOONCAKE))
    assert first == TraceRequest(0.0, 512, 9, (0,))
    assert second == TraceRequest(1.0, 600, 5, (0, 7))


def test_traces_of_our_own_limited_and_sped_up(tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", OWN)
    first, second = read_trace(path, speed=3.0)
    assert first == TraceRequest(0.0, 5, 2, tenant="acme", priority=-1)
    assert second == TraceRequest(0.5, 6, 1, ttft_objective=0.5, itl_objective=0.1)
    assert len(read_trace(path, limit=1)) == 1


@pytest.mark.parametrize(
    "text",
    ["{", '{"arrival": 1}', '{"arrival": 1, "prompt": 0, "output": 1}', "TIMESTAMP,\n1,2", ""],
)
def test_what_is_no_trace_is_refused_by_name(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"t\.jsonl"):
        read_trace(write(tmp_path / "t.jsonl", text))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "missing")


def test_profiles_name_what_is_wrong(tmp_path: Path) -> None:
    assert load_profile(PROFILE).name == "roofline-8b"
    broken = write(tmp_path / "p.yaml", PROFILE.read_text().replace("fixed:", "fxied:"))
    with pytest.raises(ConfigError, match=r"iteration\.fixed: Field required"):
        load_profile(broken)


def test_block_hashes_are_equal_exactly_where_prefixes_are() -> None:
    one = block_hashes(TraceRequest(0, 1030, 1, (4, 5, 6)), 256)
    two = block_hashes(TraceRequest(0, 1030, 1, (4, 9, 6)), 256)
    assert len(one) == 4
    assert [a == b for a, b in zip(one, two, strict=True)] == [True, True, False, False]
    assert len(set(one)) == 4
    assert block_hashes(TraceRequest(0, 1030, 1), 256) == []


def test_the_clock_runs_actions_in_order_and_never_back() -> None:
    clock, seen = Clock(), []

    def note(name: str) -> None:
        seen.append((clock.now, name))
        if name == "a":
            clock.at(0.5, note, "late")  # in the past: at once
            clock.after(1.0, note, "c")

    clock.at(2.0, note, "b")
    clock.at(1.0, note, "a")
    clock.at(2.0, note, "b2")
    clock.run()
    assert seen == [(1.0, "a"), (1.0, "late"), (2.0, "b"), (2.0, "b2"), (2.0, "c")]


def test_a_link_carries_one_piece_at_a_time_at_either_end(profile: Profile) -> None:
    links = Links(profile.link)  # 0.1 ms per token
    assert links.send("p", "d", 10, ready=1.0) == pytest.approx(1.001)
    assert links.send("p", "e", 10, ready=1.0) == pytest.approx(1.002)
    assert links.send("q", "d", 10, ready=1.0) == pytest.approx(1.002)
    assert links.send("r", "f", 10, ready=5.0) == pytest.approx(5.001)
    assert links.num_bytes == 4000


def test_percentiles() -> None:
    values = [random.Random(3).expovariate(1.0) for _ in range(1)] + [0.5] * 98 + [9.0]
    assert percentiles(values)["p50"] == 0.5
    rng, histogram = random.Random(3), Histogram()
    drawn = [rng.expovariate(20.0) for _ in range(5000)]
    for value in drawn:
        histogram.add(value)
    exact = percentiles(drawn)
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert histogram.percentile(percent) == pytest.approx(exact[name], rel=0.01)
    assert percentiles([])["p50"] != percentiles([])["p50"], "NaN of nothing"


def test_the_picture_has_a_box_per_iteration_and_a_line_per_transfer(make_spec) -> None:  # type: ignore[no-untyped-def]
    recorder = Timeline()
    trace = [TraceRequest(0.0, 20, 3), TraceRequest(0.01, 9, 4)]
    simulate(trace, make_spec(1, 1), {}, recorder)
    svg = render_svg(recorder, ["prefill-0", "decode-0"])
    root = ElementTree.fromstring(svg)
    titles = [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]
    boxes = [title for title in titles if not title.startswith("KV of")]
    assert len(boxes) == len(recorder.iterations)
    assert len(titles) - len(boxes) == len(recorder.transfers) > 0
    assert any("r0: prompt 0-8" in title for title in boxes)


def test_the_recorder_keeps_only_the_window(make_spec) -> None:  # type: ignore[no-untyped-def]
    recorder = Timeline(until=0.02)
    simulate([TraceRequest(0.0, 20, 30)], make_spec(1, 1), {}, recorder)
    assert recorder.iterations
    assert all(box.began <= 0.02 for box in recorder.iterations)


def test_the_command_prints_a_report_and_draws_a_timeline(tmp_path: Path) -> None:
    trace = write(tmp_path / "a.csv", AZURE)
    page = tmp_path / "out.html"
    arguments = ["simulate", "--trace", str(trace), "--profile", str(PROFILE), "--decode", "2"]
    arguments += ["--timeline", str(page), "--policy", "fair_share"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "1 prefill + 2 decode (fair_share / fair_share)" in shown.output
    assert "3 finished, 0 refused" in shown.output
    assert page.read_text().startswith("<!doctype html>")
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert report["requests"] == 3
    assert 0 < report["ttft"]["p50"] < report["ttft"]["p99"] < 1
    wrong = CliRunner().invoke(app, [*arguments, "--slo", "speed=1"])
    assert isinstance(wrong.exception, ConfigError)


def test_the_pieces_of_a_chunk_arrive_as_if_each_were_sent_by_itself() -> None:
    cost = LinkCost(bytes_per_second=1e6, kv_bytes_per_token=1000, latency=1e-3, layer_groups=4)
    rng = random.Random(2)
    whole, apart, at = Links(cost), Links(cost), 0.0
    for _ in range(200):
        at += rng.uniform(0, 0.2)
        tokens, ended = rng.randrange(1, 200), at + rng.uniform(0, 0.4)
        _, arrival = whole.send_chunk("p", "d", tokens, at, ended)
        step = (ended - at) / 4
        last = [apart.send("p", "d", tokens / 4, at + step * group) for group in (1, 2, 3, 4)][-1]
        assert arrival == pytest.approx(last)
    assert whole.num_bytes == pytest.approx(apart.num_bytes)
    assert whole.busy_seconds["p"] == pytest.approx(apart.busy_seconds["p"])


def test_durations_that_are_counted_together_give_the_same_percentiles() -> None:
    rng, together, alone = random.Random(3), Histogram(), Histogram()
    for spread in (0.0, 0.001, 0.5):
        durations = [0.01 * (1 + spread * rng.random()) for _ in range(50)]
        together.add_all(durations, 3)
        for seconds in durations:
            alone.add(seconds, 3)
    assert together.num_added == alone.num_added
    assert [together.percentile(p) for p in (1, 50, 99)] == [
        alone.percentile(p) for p in (1, 50, 99)
    ]
