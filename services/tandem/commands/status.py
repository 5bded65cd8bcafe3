"""`tandem status`: what the controller knows, as a table or as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Annotated

import grpc
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tandem.commands.options import ControllerAddress
from tandem.commands.progress import STATE_STYLES, role_name, state_name
from tandem.commands.terminal import console, reachable, tandem_command
from tandem.config import load_config
from tandem.core.errors import UnavailableError
from tandem.v1 import cluster_pb2, cluster_pb2_grpc

TIMEOUT = 5.0
REFRESH_INTERVAL = 1.0


def status(
    controller: ControllerAddress = "",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="refresh until ctrl-C")] = False,
) -> None:
    """Show the workers: state, load, KV blocks, links, tokens per second."""
    address = controller or default_controller()
    with grpc.insecure_channel(address) as channel:
        stub = cluster_pb2_grpc.ClusterStub(channel)
        if as_json:
            typer.echo(json.dumps(as_dict(fetch(stub, address)), indent=2))
        elif watch:
            _watch(stub, address)
        else:
            console.print(render(fetch(stub, address)))


def default_controller() -> str:
    """The controller's address by configuration."""
    config = load_config().controller
    return reachable(config.host, config.port)


def fetch(stub: cluster_pb2_grpc.ClusterStub, address: str) -> cluster_pb2.ClusterStatus:
    """Ask the controller. Raises `UnavailableError` that says what to do."""
    try:
        return stub.Status(cluster_pb2.StatusRequest(), timeout=TIMEOUT)
    except grpc.RpcError as error:
        raise UnavailableError(
            f"no Tandem controller answers at {address}; start one with "
            f"`{tandem_command()} serve`, or name it with --controller HOST:PORT"
        ) from error


def as_dict(cluster: cluster_pb2.ClusterStatus) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "model": cluster.model,
        "membership_version": cluster.membership_version,
        "dashboard": cluster.dashboard,
        "workers": [_worker_dict(worker) for worker in cluster.workers],
    }


def _worker_dict(worker: cluster_pb2.WorkerStatus) -> dict[str, object]:
    return {
        "name": worker.name,
        "role": role_name(worker),
        "state": state_name(worker),
        "pid": worker.pid,
        "node": worker.node,
        "device": worker.device,
        "incarnation": worker.incarnation,
        "address": worker.address,
        "metrics_address": worker.metrics_address,
        "running": worker.running,
        "waiting": worker.waiting,
        "blocks_used": worker.blocks_used,
        "blocks_cached": worker.blocks_cached,
        "blocks_total": worker.blocks_total,
        "links": worker.links,
        "tokens_per_second": worker.tokens_per_second,
        "iterations": worker.iterations,
        "lent_requests": worker.lent_requests,
        "lent_tokens": worker.lent_tokens,
        "policy": worker.policy,
        "kernels": worker.kernels,
        "preemptions": dict(worker.preemptions),
        "host_blocks_used": worker.host_blocks_used,
        "host_blocks_cached": worker.host_blocks_cached,
        "host_blocks_total": worker.host_blocks_total,
        "host_blocks_copied": dict(worker.host_blocks_copied),
        "tensor_parallel": worker.tensor_parallel,
        "kv_capacity": worker.kv_capacity,
        "restarts": worker.restarts,
        "detail": worker.detail,
    }


def render(cluster: cluster_pb2.ClusterStatus) -> RenderableType:
    """What people see."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("worker", "role", "state", "pid", "device"):
        table.add_column(heading, no_wrap=True)
    for heading in ("run", "wait", "blocks", "links", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for worker in cluster.workers:
        table.add_row(*_row(worker))
    nodes = sorted({worker.node for worker in cluster.workers if worker.node})
    facts = [f"model {cluster.model}"]
    facts += [f"node {nodes[0]}"] if len(nodes) == 1 else []
    policies = {worker.policy for worker in cluster.workers if worker.policy}
    if len(policies) > 1:
        policies = {f"{role_name(w)} {w.policy}" for w in cluster.workers if w.policy}
    facts += [f"policy {', '.join(sorted(policies))}"] if policies else []
    kernels = sorted({worker.kernels for worker in cluster.workers if worker.kernels})
    legend = ", ".join([*(f"kernels {name}" for name in kernels), "blocks used/cached/total"])
    lines: list[RenderableType] = [Text(", ".join(facts)), Text(legend, style="dim"), table]
    lines += [_capacity(capacity, cluster.workers) for capacity in _capacities(cluster)]
    lines += [_note(worker, many_nodes=len(nodes) > 1) for worker in cluster.workers]
    if cluster.dashboard:
        lines.append(Text(f"dashboard {cluster.dashboard}", style="dim"))
    return Group(*(line for line in lines if line))


def _row(worker: cluster_pb2.WorkerStatus) -> list[str | Text]:
    state = state_name(worker)
    return [
        worker.name,
        role_name(worker),
        Text(state, style=STATE_STYLES.get(state, "")),
        str(worker.pid or "-"),
        _device(worker),
        str(worker.running),
        str(worker.waiting),
        f"{worker.blocks_used}/{worker.blocks_cached}/{worker.blocks_total}",
        str(worker.links),
        f"{worker.tokens_per_second:.1f}",
    ]


def _device(worker: cluster_pb2.WorkerStatus) -> str:
    """Where it runs, and over how many ranks if there are several."""
    several = worker.tensor_parallel > 1
    return f"{worker.device} tp {worker.tensor_parallel}" if several else worker.device or "-"


def _capacities(cluster: cluster_pb2.ClusterStatus) -> list[str]:
    return sorted({worker.kv_capacity for worker in cluster.workers if worker.kv_capacity})


def _capacity(capacity: str, workers: Iterable[cluster_pb2.WorkerStatus]) -> Text:
    """KV blocks, and which workers have that many."""
    names = ", ".join(worker.name for worker in workers if worker.kv_capacity == capacity)
    return Text(f"KV of {names}: {capacity}", style="dim")


def _note(worker: cluster_pb2.WorkerStatus, *, many_nodes: bool) -> Text:
    """What does not fit into the table, where there is something to say."""
    notes = [f"node {worker.node}"] if many_nodes and worker.node else []
    notes += [f"restarts: {worker.restarts}"] if worker.restarts else []
    if worker.lent_requests:
        kind = "prompt" if worker.role == cluster_pb2.ROLE_DECODE else "output"
        lent = f"{worker.lent_requests} requests, {worker.lent_tokens} {kind} tokens"
        notes.append(f"lent to the other pool: {lent}")
    notes += [worker.detail] if worker.detail else []
    if sum(worker.host_blocks_copied.values()):
        used, cached = worker.host_blocks_used, worker.host_blocks_cached
        notes += [f"host blocks {used}/{cached}/{worker.host_blocks_total}"]
    gave_way = {way: number for way, number in sorted(worker.preemptions.items()) if number}
    if gave_way:
        notes += ["preempted " + ", ".join(f"{way} {n}" for way, n in gave_way.items())]
    return Text(f"{worker.name}: {', '.join(notes)}" if notes else "", style="dim")


def _watch(stub: cluster_pb2_grpc.ClusterStub, address: str) -> None:
    with Live(render(fetch(stub, address)), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(REFRESH_INTERVAL)
                live.update(render(fetch(stub, address)), refresh=True)
        except KeyboardInterrupt:
            return
