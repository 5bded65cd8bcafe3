"""Every setting, as frozen models that are made once, checked once and passed down.

Where the values come from (file, environment, flags) is `tandem.config`'s business.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tandem.core.cores import parse_cores
from tandem.core.pairs import parse_pairs

Seconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
DType = Literal["auto", "float32", "bfloat16", "float16"]
RoutingPolicy = Literal["round_robin", "least_loaded", "prefix_aware"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Frozen):
    """Which model is served and how it is held."""

    path: str = Field("", description="model directory or Hub id; empty: the bundled model")
    served_name: str = Field("", description="name that clients use; empty: last part of the path")
    dtype: DType = Field("auto", description="auto: float32 on CPU, the checkpoint's own on CUDA")
    max_model_len: int = Field(0, ge=0, description="context in tokens; 0: the model's own")
    packed_cache: str = Field(
        "",
        description="directory where CPU workers keep packed weights for the next start; "
        "empty: tandem/packed in the user's cache directory; off: nowhere",
    )
    packed_cache_bytes: int = Field(
        64 * 2**30, ge=0, description="bound of packed_cache; the longest unused go first"
    )


class CacheConfig(_Frozen):
    """The KV blocks of one worker."""

    block_size: int = Field(16, ge=1, le=256, description="tokens per KV block")
    num_blocks: int = Field(0, ge=0, description="KV blocks per worker; 0: from memory")
    memory_bytes: int = Field(
        0, ge=0, description="bytes of KV per worker when num_blocks is 0; 0: from free memory"
    )
    memory_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of free memory that the KV of this machine's workers may take; "
        "0: 0.85 on CUDA, 0.5 on CPU",
    )
    prefix_cache: bool = Field(True, description="keep the blocks of finished prompts for reuse")
    host_memory_bytes: int = Field(
        0,
        ge=0,
        description="bytes of host memory per worker that the prefix cache may spill into; 0: none",
    )
    swap_memory_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="bytes of host memory per worker that preempted sequences may take, whatever "
        "host_memory_bytes is; the larger of the two is set aside, and used for both",
    )


class SchedulerConfig(_Frozen):
    """What one worker's iterations are made of: the policy, its settings, and the limits."""

    policy: str = Field(
        "chunked_prefill", description="scheduling policy of every worker; see docs/scheduling.md"
    )
    prefill_policy: str = Field("", description="policy of prefill workers; empty: as policy")
    decode_policy: str = Field("", description="policy of decode workers; empty: as policy")

    max_batch_tokens: int = Field(512, ge=1, description="token budget of one iteration")
    chunk_size: int = Field(
        256, ge=1, description="most prompt tokens of one sequence per iteration"
    )
    max_running: int = Field(128, ge=1, description="sequences that hold blocks at once")
    max_waiting: int = Field(
        1024, ge=1, description="bound of the queue; past it requests are refused"
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto",
        description="decode workers schedule the next iteration while one computes; auto: on CUDA",
    )
    preemption: Literal["auto", "refill", "swap", "wait"] = Field(
        "auto",
        description="what happens when blocks run out: swap: the last sequence's KV is copied to "
        "host memory and back; refill: dropped and computed again; wait: for a sequence that is "
        "sure to end; auto: the cheapest by estimate",
    )
    batch_size: int = Field(8, ge=1, description="static_batching: members of a group")
    batch_wait: float = Field(
        0.25, ge=0, description="static_batching: seconds to wait for a group to fill"
    )
    decode_streak: int = Field(
        8, ge=1, description="decode_first: iterations without a prompt while prompts wait"
    )
    auto_chunk_ratio: float = Field(
        2.0, gt=1, description="auto_chunk: longest iteration, in decode steps"
    )
    auto_chunk_seconds: float = Field(
        0.0, ge=0, description="auto_chunk: longest iteration in seconds; 0: by auto_chunk_ratio"
    )
    priority_classes: str = Field(
        "premium=-10,standard=0,batch=10",
        description="priority_classes: names and the priorities at which they begin",
    )
    ageing: Seconds = Field(
        10.0, description="priority_classes: seconds of waiting that are worth one class"
    )
    ttft_objective: Seconds = Field(
        2.0, description="deadline: seconds to the first token, of requests that say nothing"
    )
    itl_objective: Seconds = Field(
        0.2,
        description="deadline, lending: seconds between tokens, of requests that say nothing",
    )
    tenant_weights: str = Field(
        "", description="fair_share: tenant=weight, ...; tenants that are not named weigh 1"
    )
    waiting_bound: Seconds = Field(
        30.0, description="shortest_prompt, deadline: seconds after which one is overtaken no more"
    )

    @field_validator("priority_classes", "tenant_weights")
    @classmethod
    def _check_pairs(cls, text: str) -> str:
        parse_pairs(text)
        return text

    @field_validator("tenant_weights")
    @classmethod
    def _check_weights(cls, text: str) -> str:
        if any(weight <= 0 for weight in parse_pairs(text).values()):
            raise ValueError("weights must be above 0")
        return text


class TransferConfig(_Frozen):
    """KV links between two workers."""

    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto", description="auto: nccl on CUDA, else gloo"
    )
    layers_per_group: int = Field(
        0, ge=0, description="layers per KV send; 0: four groups per chunk"
    )
    max_links: int = Field(
        32, ge=1, description="open links per worker; idle ones are evicted past it"
    )
    connect_timeout: Seconds = Field(10.0, description="seconds to open a link")
    transfer_timeout: Seconds = Field(30.0, description="seconds for one announced piece to arrive")
    max_retries: int = Field(
        3, ge=0, description="times a broken link is rebuilt before its legs fail"
    )


class WorkerConfig(_Frozen):
    """What a prefill or decode worker does beside running the model."""

    host: str = Field("127.0.0.1", description="address that peers reach this worker at")
    threads: int = Field(0, ge=0, description="CPU threads of the model; 0: cores / workers")
    cpu_affinity: str = Field(
        "auto",
        description="cores of a CPU worker. auto: a set of its own for each worker of the machine, "
        "if that leaves a core for the rest; off: wherever the kernel puts it; or a list: 0,2-3",
    )
    heartbeat_interval: Seconds = Field(
        0.5, description="seconds between heartbeats on every stream"
    )
    peer_timeout: Seconds = Field(5.0, description="silence after which a peer counts as frozen")
    progress_timeout: Seconds = Field(
        60.0, description="seconds without an iteration while work waits"
    )
    queue_timeout: Seconds = Field(
        120.0, description="seconds a request may wait for its first iteration"
    )
    reassign_timeout: Seconds = Field(
        5.0, description="seconds to wait for another prefill worker before prefilling locally"
    )
    disaggregated: bool = Field(True, description="false: decode workers prefill everything")
    local_prefill_max_tokens: int = Field(
        32,
        ge=0,
        description="uncached prompt tokens up to which the decode worker prefills itself, "
        "unless lending.mode is off or what is measured says otherwise",
    )

    @field_validator("cpu_affinity")
    @classmethod
    def _check_affinity(cls, text: str) -> str:
        if text not in ("auto", "off"):
            parse_cores(text)
        return text


class PoolConfig(_Frozen):
    """What the workers of one role have for themselves."""

    tensor_parallel: int = Field(
        1, ge=1, le=64, description="ranks of one worker, each with its share of heads and weights"
    )


class RouterConfig(_Frozen):
    """How the gateway assigns workers."""

    policy: RoutingPolicy = Field("prefix_aware", description="how workers are chosen")
    prefix_weight: float = Field(
        1.0, ge=0, description="how much of a queued token a cached prompt token is worth"
    )
    max_prefix_bonus_tokens: int = Field(
        2048, ge=0, description="most tokens of advantage that a cached prefix gives"
    )
    max_in_flight: int = Field(1024, ge=1, description="requests per decode worker before 429")
    max_tracked_blocks: int = Field(65536, ge=1, description="prefix blocks remembered per worker")


class LendingConfig(_Frozen):
    """How one pool's slack serves the other."""

    mode: Literal["measured", "threshold", "off"] = Field(
        "measured",
        description="where prompts are computed: measured: where the first token is predicted "
        "sooner; threshold: by worker.local_prefill_max_tokens; off: by prefill workers only",
    )
    margin: float = Field(
        0.15, ge=0, lt=1, description="measured: share of its time that a move must save"
    )
    min_gain: float = Field(
        0.005, ge=0, description="measured: seconds that a move must save; its messages take some"
    )
    max_moves: int = Field(3, ge=0, description="measured: times that one prompt may move")
    max_kept: int = Field(
        8,
        ge=0,
        description="measured: requests that an idle prefill worker decodes itself while decode "
        "workers are out of blocks",
    )


class GatewayConfig(_Frozen):
    """The front door."""

    host: str = Field("127.0.0.1", description="address of the HTTP and gRPC servers")
    port: Port = Field(8000, description="HTTP port; 0 picks a free one")
    grpc_port: Port = Field(50051, description="gRPC port; 0 picks a free one")
    processes: int = Field(
        1, ge=1, le=256, description="gateway processes that share the HTTP and the gRPC port"
    )
    metrics_port: Port = Field(
        8100,
        description="with several processes, the port where the first answers alone (/metrics, "
        "/ready); each other takes the next one; 0 picks free ones",
    )
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="largest request body")
    max_n: int = Field(16, ge=1, description="largest n of a request")
    max_attempts: int = Field(5, ge=1, description="times a request is dispatched before it fails")
    worker_timeout: Seconds = Field(
        5.0, description="silence after which a decode worker counts as frozen"
    )
    progress_timeout: Seconds = Field(
        60.0, description="seconds without an iteration while it has work"
    )
    no_worker_timeout: Seconds = Field(
        120.0, description="seconds a request waits while no decode worker is ready"
    )
    api_keys_file: str = Field(
        "", description="YAML file that maps API keys to tenants (`key: tenant`); empty: none"
    )
    response_cache_bytes: int = Field(
        0, ge=0, description="answers to reproducible requests that are kept; 0: none are"
    )
    response_cache_ttl: Seconds = Field(300.0, description="seconds for which they are good")
    router: RouterConfig = RouterConfig()


class ControllerConfig(_Frozen):
    """The pools and who watches them."""

    host: str = Field("127.0.0.1", description="address of the controller's gRPC server")
    port: Port = Field(
        50050, description="port of the controller's gRPC server; 0 picks a free one"
    )
    prefill_workers: int = Field(1, ge=0, description="workers in the prefill pool")
    decode_workers: int = Field(1, ge=1, description="workers in the decode pool")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that Ray reserves per worker")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that Ray reserves per worker")
    heartbeat_interval: Seconds = Field(0.5, description="seconds between probes of a worker")
    worker_timeout: Seconds = Field(
        5.0, description="silence after which a worker counts as frozen"
    )
    replace_after: Seconds = Field(
        10.0, description="seconds that a frozen worker may take to wake before it is replaced"
    )
    dashboard: bool = Field(True, description="start the Ray dashboard with a local cluster")
    dashboard_port: Port = Field(8265, description="port of the Ray dashboard")


class TracingConfig(_Frozen):
    """What workers and gateways record of their iterations, KV transfers and requests."""

    always: bool = Field(
        False, description="record from the start; else only while `tandem trace` asks for it"
    )
    max_events: int = Field(
        65536, ge=1, description="events kept per process; the oldest give way to new ones"
    )


class TandemConfig(_Frozen):
    """The whole configuration."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    transfer: TransferConfig = TransferConfig()
    worker: WorkerConfig = WorkerConfig()
    prefill: PoolConfig = PoolConfig()
    decode: PoolConfig = PoolConfig()
    lending: LendingConfig = LendingConfig()
    gateway: GatewayConfig = GatewayConfig()
    controller: ControllerConfig = ControllerConfig()
    tracing: TracingConfig = TracingConfig()
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe log lines that are written"
    )

    def tensor_parallel(self, role: Literal["prefill", "decode"]) -> int:
        """Ranks of one worker of a role."""
        return (self.prefill if role == "prefill" else self.decode).tensor_parallel
