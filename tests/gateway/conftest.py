"""A small byte-level BPE model directory, and what stands in for the cluster in gateway tests."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc.aio
import httpx
import pytest
import structlog
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tandem.core.config import GatewayConfig
from tandem.core.errors import TandemError
from tandem.core.request import FinishReason, PositionLogprobs, Request, TokenLogprob
from tandem.gateway.changes import Changes
from tandem.gateway.http.app import create_app
from tandem.gateway.interfaces import HandoverTimes, ModelInfo, OutputEvent, StageTimes
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.server import GatewayServer
from tandem.gateway.service import InferenceService
from tandem.gateway.text.tokenizer import Tokenizer, load_tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "prefill and decode stand on separate workers; the cache streams between them",
    "größe über 你好 世界 🙂🙃 naïve café",
]


def write_model_dir(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write tokenizer files: every byte, some merges and four special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|bos|>", "<|eos|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session", autouse=True)
def _plain_tracebacks() -> None:
    """The default rendering of an exception takes seconds, in which the event loop stands still."""
    renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.processors.add_log_level, renderer])


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with tokenizer and chat template; read only."""
    return write_model_dir(tmp_path_factory.mktemp("model"))


MODEL_NAME = "tiny"
MAX_MODEL_LEN = 64
VOCAB_SIZE = 320
EOS = 1
REPLY = " the quick brown fox jumps over the lazy dog"


class FakeDispatcher:
    """Stands in for the cluster: says `reply` token by token, then end of sequence."""

    def __init__(self, info: ModelInfo, reply: list[int]) -> None:
        self.changes = Changes()
        self.model: ModelInfo | None = info
        self.ready = True
        self.reply = reply
        self.cached_tokens = 0
        self.tokens_per_event = 1
        self.stages: StageTimes | None = None
        self.handover: HandoverTimes | None = None
        self.errors: dict[int, Exception] = {}
        """Raised instead of the token at that position."""
        self.pause_at: int | None = None
        """Wait for `resume` before the token at that position."""
        self.paused = asyncio.Event()
        self.resume = asyncio.Event()
        self.requests: list[Request] = []
        self.active: set[str] = set()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        """Ids of requests whose stream was closed before its end."""
        self.closed = False

    def __setattr__(self, name: str, value: object) -> None:
        """Tells of a change, as the real one does."""
        super().__setattr__(name, value)
        if name in ("model", "ready"):
            self.changes.notify()

    async def start(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        self.closed = True

    async def generate(self, request: Request) -> AsyncGenerator[OutputEvent, None]:
        self.requests.append(request)
        self.active.add(request.request_id)
        over = False
        try:
            async for event in self._events(request):
                over = event.finish_reason is not None
                yield event
        except TandemError:
            over = True
            raise
        finally:
            self.active.discard(request.request_id)
            if not over:
                self.cancelled.put_nowait(request.request_id)

    async def _events(self, request: Request) -> AsyncGenerator[OutputEvent, None]:
        tokens, reason = self.plan(request)
        step = self.tokens_per_event
        for start in range(0, len(tokens), step):
            if self.pause_at is not None and start >= self.pause_at:
                self.paused.set()
                await self.resume.wait()
            if start in self.errors:
                raise self.errors[start]
            chunk = tuple(tokens[start : start + step])
            last = start + step >= len(tokens)
            first = start == 0
            yield OutputEvent(
                token_ids=chunk,
                logprobs=self._logprobs(chunk, request.sampling.logprobs),
                prompt_logprobs=self._prompt_logprobs(request) if first else None,
                finish_reason=reason if last else None,
                stop_token_id=chunk[-1] if last and reason == "stop" else None,
                cached_tokens=self.cached_tokens,
                stages=self.stages if first else None,
                handover=self.handover if first else None,
            )

    def plan(self, request: Request) -> tuple[list[int], FinishReason]:
        """What the worker would say, and why it would stop."""
        sampling = request.sampling
        stops = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS])}
        said: list[int] = []
        for token_id in itertools.cycle([*self.reply, EOS]):
            said.append(token_id)
            if token_id in stops and len(said) >= sampling.min_tokens:
                return said, "stop"
            if len(said) == sampling.max_tokens:
                return said, "length"
        raise AssertionError("a cycle does not end")

    @staticmethod
    def _logprobs(tokens: tuple[int, ...], top: int | None) -> tuple[PositionLogprobs, ...]:
        if top is None:
            return ()
        return tuple(
            PositionLogprobs(
                TokenLogprob(token, -0.5, 1),
                tuple(TokenLogprob((token + n) % VOCAB_SIZE, -0.5 - n, n + 1) for n in range(top)),
            )
            for token in tokens
        )

    def _prompt_logprobs(self, request: Request) -> tuple[PositionLogprobs | None, ...] | None:
        top = request.sampling.prompt_logprobs
        if top is None:
            return None
        return (None, *self._logprobs(request.token_ids[1:], top))


@pytest.fixture
def info(model_dir: Path) -> ModelInfo:
    return ModelInfo(MODEL_NAME, str(model_dir), MAX_MODEL_LEN, 16, VOCAB_SIZE)


@pytest.fixture
def tokenizer(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


@pytest.fixture
def dispatcher(info: ModelInfo, tokenizer: Tokenizer) -> FakeDispatcher:
    return FakeDispatcher(info, tokenizer.encode(REPLY, add_special_tokens=False))


@pytest.fixture
def config() -> GatewayConfig:
    return GatewayConfig(port=0, grpc_port=0, max_body_bytes=4096, max_n=4)


@pytest.fixture
def metrics() -> GatewayMetrics:
    return GatewayMetrics()


@pytest.fixture
async def service(
    dispatcher: FakeDispatcher, metrics: GatewayMetrics
) -> AsyncGenerator[InferenceService, None]:
    """A service whose model is loaded."""
    service = InferenceService(dispatcher, metrics)
    await service.start()
    await service.model(None)
    yield service
    await service.close()


@pytest.fixture
async def client(
    service: InferenceService, config: GatewayConfig, metrics: GatewayMetrics
) -> AsyncGenerator[httpx.AsyncClient, None]:
    """Calls the app in this process. Streams arrive whole."""
    transport = httpx.ASGITransport(create_app(service, config, metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.fixture
async def server(
    dispatcher: FakeDispatcher, config: GatewayConfig, metrics: GatewayMetrics
) -> AsyncGenerator[GatewayServer, None]:
    """A gateway on free ports, ready for requests."""
    server = GatewayServer(config, dispatcher, metrics, grace_seconds=1)
    await server.start()
    await server.service.model(None)
    yield server
    dispatcher.resume.set()
    await server.stop()


@pytest.fixture
async def channel(server: GatewayServer) -> AsyncGenerator[grpc.aio.Channel, None]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield channel
