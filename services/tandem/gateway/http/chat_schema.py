"""The body of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tandem.core.errors import InvalidRequestError
from tandem.gateway.http.fields import GenerationFields, StrictModel
from tandem.gateway.params import SamplingOptions


def _text_of_parts(content: Any) -> Any:
    """Content is a string, or a list of parts of type `text`, which are joined by line breaks."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"Content parts must be of type 'text', not {kind!r}")
        if not isinstance(part.get("text"), str):
            raise ValueError("A content part of type 'text' must have a string 'text'")
        texts.append(part["text"])
    return "\n".join(texts)


class Message(StrictModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of_parts)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, data: Any) -> Any:
        if isinstance(data, dict) and (data.get("tool_calls") or data.get("function_call")):
            raise ValueError("Tool calls are not supported by this server")
        return data

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it; they know `developer` as `system`."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatFields(StrictModel):
    """What a prompt is made of; `/tokenize` takes the same."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    def messages_for_template(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates expect them."""
        return [message.for_template() for message in self.messages]


class ChatRequest(GenerationFields, ChatFields):
    """The whole body."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def sampling(self) -> SamplingOptions:
        """Return the sampling parameters as the client states them."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs is only allowed when logprobs is true", param="top_logprobs"
            )
        current = self.max_completion_tokens
        return self.sampling_options(
            max_tokens=self.max_tokens if current is None else current,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )
