"""Chat templates render as `transformers` renders them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tandem.core.errors import InvalidRequestError, ModelLoadError
from tandem.gateway.text.chat_template import ChatTemplate, load_chat_template

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<hi> é 🙂"}]
TEMPLATES = [
    "{% for m in messages %}\n  {% if loop.last %}\n[{{ m.content }}]\n  {% endif %}\n{% endfor %}",
    "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 7 %}{% endfor %}{{ ns.n }}",
    "{{ bos_token }}{% if add_generation_prompt %}assistant: {% endif %}{{ flavour }}",
    "{% if tools is not none %}tools{% endif %}{{ strftime_now('%%') }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(source: str, prompt: bool) -> None:
    ours = ChatTemplate(source, {"bos_token": "<s>"}).render(
        MESSAGES, add_generation_prompt=prompt, variables={"flavour": "sweet"}
    )
    theirs, _ = render_jinja_template(
        [MESSAGES],
        chat_template=source,
        add_generation_prompt=prompt,
        bos_token="<s>",
        flavour="sweet",
    )
    assert ours == theirs[0]


def test_what_the_template_refuses_is_a_bad_request() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        template.render(MESSAGES)
    assert caught.value.param == "messages"


def test_the_sandbox_keeps_templates_out_of_python() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(InvalidRequestError):
        template.render(MESSAGES)


def test_messages_of_the_client_cannot_be_replaced_by_variables() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert template.render(MESSAGES, variables={"messages": []}) == "be brief"


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, {}) is None
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "from list"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = load_chat_template(tmp_path, {})
    assert template is not None
    assert template.render(MESSAGES) == "from list"
    (tmp_path / "chat_template.jinja").write_text("from file")
    template = load_chat_template(tmp_path, {})
    assert template is not None
    assert template.render(MESSAGES) == "from file"


def test_a_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="chat template"):
        ChatTemplate("{% for %}", {})
