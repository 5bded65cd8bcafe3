"""What `tandem serve` prints when it is ready: how to use it, ready to be pasted."""

from __future__ import annotations

import os

from tandem.commands.terminal import console, python_command, reachable, tandem_command
from tandem.core.config import GatewayConfig, TandemConfig
from tandem.modelfiles import served_name


def print_hints(config: TandemConfig, dashboard: str) -> None:
    """Print the examples."""
    base = f"http://{reachable(config.gateway.host, config.gateway.port)}"
    grpc_address = reachable(config.gateway.host, config.gateway.grpc_port)
    model = served_name(config.model.path, config.model.served_name)
    console.print(f"\n[bold green]Tandem serves {model}[/] at {base}/v1 and gRPC {grpc_address}\n")
    for title, command in examples(config, base, grpc_address, model):
        console.print(f"[bold]{title}[/]")
        console.print(command, markup=False, soft_wrap=True)
        console.print()
    if dashboard:
        console.print(f"Ray dashboard: {dashboard}", markup=False)
        console.print(f"  its token: {token_location()}", markup=False, soft_wrap=True)
        console.print("  in a shell: RAY_AUTH_MODE=token ray list actors")
    console.print("Stop with ctrl-C.\n")


def token_location() -> str:
    """Where the token is that Ray asks for."""
    if "RAY_AUTH_TOKEN" in os.environ:
        return "in RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")


def examples(
    config: TandemConfig, base: str, grpc_address: str, model: str
) -> list[tuple[str, str]]:
    """Title and command of each example."""
    tandem = tandem_command()
    question = '"messages": [{"role": "user", "content": "What is Tandem?"}]'
    curl = f"curl -s {base}/v1/chat/completions -H 'Content-Type: application/json'"
    default = GatewayConfig()
    chat_flags = "" if config.gateway.port == default.port else f" --url {base}"
    call_flags = (
        "" if config.gateway.grpc_port == default.grpc_port else f" --address {grpc_address}"
    )
    status_flags = _status_flags(config)
    return [
        ("Ask", f'{curl} \\\n  -d \'{{"model": "{model}", {question}}}\''),
        (
            "Ask and stream",
            f'{curl} -N \\\n  -d \'{{"model": "{model}", {question}, "stream": true}}\'',
        ),
        ("With the openai package", _openai_example(base, model)),
        (
            "gRPC, through reflection",
            f"{tandem} call tandem.v1.Inference/Generate "
            f'\'{{"text": "Q: What is Tandem?\\nA:"}}\'{call_flags}',
        ),
        ("Chat in the terminal", f"{tandem} chat{chat_flags}"),
        ("Look at the workers", f"{tandem} status{status_flags}"),
    ]


def _status_flags(config: TandemConfig) -> str:
    controller = config.controller
    default = type(controller)()
    if (controller.host, controller.port) == (default.host, default.port):
        return ""
    return f" --controller {reachable(controller.host, controller.port)}"


def _openai_example(base: str, model: str) -> str:
    return f"""{python_command()} - <<'EOF'
from openai import OpenAI
client = OpenAI(base_url="{base}/v1", api_key="none")
stream = client.chat.completions.create(
    model="{model}", stream=True,
    messages=[{{"role": "user", "content": "What is Tandem?"}}])
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
EOF"""
