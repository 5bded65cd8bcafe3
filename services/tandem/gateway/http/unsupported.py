"""Fields that OpenAI-compatible clients send, that change the meaning of a request, and that this
server does not do: refused by name. A field that nobody knows is ignored, as elsewhere.

Each field has the values that ask for nothing; with one of these, or null, it is let through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.core.errors import InvalidRequestError

_GENERATION: Mapping[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "typical_p": (1,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
}
CHAT: Mapping[str, tuple[object, ...]] = {
    **_GENERATION,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "echo": (False,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
}
COMPLETIONS: Mapping[str, tuple[object, ...]] = {
    **_GENERATION,
    "suffix": ("",),
    "prompt_embeds": (),
}


def refuse_unsupported(
    content: Mapping[str, Any], unsupported: Mapping[str, tuple[object, ...]]
) -> None:
    """Raise `InvalidRequestError` for the first field that asks for what is not done here."""
    for name in unsupported.keys() & content.keys():
        value = content[name]
        if value is None or value in unsupported[name]:
            continue
        harmless = " or ".join(repr(allowed) for allowed in unsupported[name])
        hint = f"only {harmless} is" if harmless else "it is not"
        raise InvalidRequestError(
            f"{name} is not supported by this server ({hint} accepted)",
            param=name,
            code="unsupported_parameter",
        )
