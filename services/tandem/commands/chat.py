"""`tandem chat`: a conversation in the terminal, over the gateway's HTTP API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

import httpx
import typer

from tandem.commands.terminal import console, errors, print_error, reachable, tandem_command
from tandem.config import load_config
from tandem.core.errors import TandemError, UnavailableError

CONNECT_TIMEOUT = 5.0
HELP = "/reset forgets the conversation, /quit (or ctrl-D) ends it, ctrl-C stops an answer"

Message = dict[str, str]


def chat(
    url: Annotated[str, typer.Option(help="base URL of the gateway", show_default=False)] = "",
    model: Annotated[str, typer.Option(help="model name; default: the one served")] = "",
    system: Annotated[str, typer.Option(help="system message")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="longest answer in tokens")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
) -> None:
    """Chat with the model. Answers stream; the conversation is remembered."""
    base = url.rstrip("/") or _default_url()
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT)
    options: dict[str, object] = {"max_tokens": max_tokens, "temperature": temperature}
    body = {name: value for name, value in options.items() if value is not None}
    with httpx.Client(base_url=base, timeout=timeout, trust_env=False) as client:
        try:
            body["model"] = model or _served_model(client)
            console.print(f"[bold]{body['model']}[/] at {base}. {HELP}")
            _converse(client, body, system)
        except httpx.ConnectError as error:
            raise UnavailableError(
                f"nothing is listening at {base}; start `{tandem_command()} serve`, "
                "or name a gateway with --url"
            ) from error


def _converse(client: httpx.Client, options: dict[str, object], system: str) -> None:
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    while True:
        try:
            line = console.input("[bold cyan]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            history = list(opening)
            console.print("[dim]forgotten[/]")
        elif line == "/help":
            console.print(HELP)
        elif line:
            history.append({"role": "user", "content": line})
            answer = _answer(client, options, history)
            if answer:
                history.append({"role": "assistant", "content": answer})
            else:
                history.pop()


def _answer(client: httpx.Client, options: dict[str, object], history: list[Message]) -> str:
    """Stream one answer to the terminal; what came before an error or ctrl-C counts."""
    parts: list[str] = []
    try:
        for piece in stream_answer(client, {**options, "messages": history}):
            parts.append(piece)
            console.print(piece, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        errors.print("\n[dim]stopped[/]", end="")
    except TandemError as error:
        print_error(error.message)
    except httpx.ConnectError:
        raise
    except httpx.HTTPError as error:
        print_error(f"the connection broke: {error}")
    console.print()
    return "".join(parts)


def stream_answer(client: httpx.Client, body: dict[str, object]) -> Iterator[str]:
    """Yield the text of one completion. Raises `UnavailableError` with the server's message."""
    request = {**body, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=request) as response:
        if response.status_code != httpx.codes.OK:
            response.read()
            raise UnavailableError(error_message(response.text, response.status_code))
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise UnavailableError(error_message(data, response.status_code))
            for choice in chunk.get("choices", ()):
                if content := choice.get("delta", {}).get("content"):
                    yield content


def error_message(text: str, status: int) -> str:
    """The message of an OpenAI-shaped error, else whatever the server said."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}: {text.strip()[:200]}"


def _served_model(client: httpx.Client) -> str:
    response = client.get("/v1/models")
    if response.status_code != httpx.codes.OK:
        raise UnavailableError(error_message(response.text, response.status_code))
    models = response.json().get("data", [])
    if not models:
        raise UnavailableError("the gateway serves no model yet")
    return str(models[0]["id"])


def _default_url() -> str:
    gateway = load_config().gateway
    return f"http://{reachable(gateway.host, gateway.port)}"
