"""`tandem config`: the settings in effect, or the reference page of all settings."""

from __future__ import annotations

from typing import Annotated

import typer

from tandem.commands.options import takes_config
from tandem.config import FLAGS, allowed, dump_config, environment_variable, walk_settings
from tandem.core.config import TandemConfig

PREAMBLE = """\
# Configuration

<!-- Made by `tandem config --reference`; a test keeps it in step with the code. -->

A setting comes from, in this order: a flag, an environment variable, the file given with
`--config`, its default. `tandem config` prints what is in effect. A wrong value is refused at
start, with the name of the setting, what it may be, and where the value came from.

```yaml
# tandem.yaml: tandem serve --config tandem.yaml
model:
  path: /models/Qwen2.5-0.5B-Instruct
controller:
  prefill_workers: 1
  decode_workers: 2
```

The environment variable of a setting is `TANDEM_`, the section, `__` and the field, such as
`{variable}`. Settings without a flag of their own are set by `--set`, such as
`--set gateway.max_n=4`. Times are in seconds.
"""


@takes_config
def config(
    config: TandemConfig,
    reference: Annotated[
        bool, typer.Option("--reference", help="print the page of all settings, as Markdown")
    ] = False,
) -> None:
    """Print the configuration in effect, as YAML."""
    typer.echo(render_reference() if reference else dump_config(config), nl=False)


def render_reference() -> str:
    """Every setting with default, allowed values, flag and meaning, as Markdown."""
    lines = [PREAMBLE.format(variable=environment_variable("gateway.port")).rstrip()]
    section = None
    for name, field in walk_settings():
        here = name.rpartition(".")[0]
        if here != section:
            section = here
            lines += [
                f"\n## {section or 'everything'}\n",
                "| setting | default | may be | flag | |",
            ]
            lines.append("|---|---|---|---|---|")
        flag = FLAGS.get(name, "").replace("/", " / ")
        default = f"`{_plain(field.default)}`" if field.default != "" else ""
        meaning = field.description or ""
        cells = (f"`{name}`", default, allowed(field), f"`{flag}`" if flag else "", meaning)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
