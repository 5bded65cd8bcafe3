"""The flags of every command that takes the configuration, made from the settings themselves.

One table, `tandem.config.FLAGS`, says which setting has which flag; types, help texts and defaults
come from the models, so flags and settings cannot drift apart.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from tandem.config import FLAGS, load_config, walk_settings
from tandem.core.errors import ConfigError
from tandem.scheduler import PoolRole, make_policy

PANELS = {
    "model": "Model",
    "cache": "KV cache",
    "scheduler": "Scheduling",
    "transfer": "Scheduling",
    "worker": "Scheduling",
    "prefill": "Cluster",
    "decode": "Cluster",
    "lending": "Scheduling",
    "gateway": "Gateway",
    "controller": "Cluster",
}

ROLES: tuple[PoolRole, ...] = ("prefill", "decode")

ControllerAddress = Annotated[
    str,
    typer.Option(
        "--controller",
        metavar="HOST:PORT",
        help="gRPC address of the controller",
        show_default=False,
    ),
]
RayAddress = Annotated[
    str,
    typer.Option(
        "--ray-address",
        envvar="RAY_ADDRESS",
        metavar="HOST:PORT",
        help="Ray cluster to use",
        show_default=False,
    ),
]


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all configuration flags; it receives the checked result as `config`."""
    declared = inspect.signature(command, eval_str=True).parameters
    own = [parameter for name, parameter in declared.items() if name != "config"]
    flags = _flag_parameters()

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        given = {
            setting: values.pop(parameter.name)
            for setting, parameter in flags.items()
            if parameter.name in values
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        chosen.update(_parse_assignments(values.pop("assignments") or ()))
        config = load_config(values.pop("config_file") or "", chosen)
        for role in ROLES:
            make_policy(config.scheduler, role)  # a name that nobody provides ends here
        command(config=config, **values)

    parameters = [*own, *_file_parameters(), *flags.values()]
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    wrapper.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in keyword_only}
    return wrapper


def _flag_parameters() -> dict[str, inspect.Parameter]:
    fields = dict(walk_settings())
    return {setting: _flag_parameter(setting, fields[setting]) for setting in FLAGS}


def _flag_parameter(setting: str, field: FieldInfo) -> inspect.Parameter:
    kind = field.annotation if field.annotation in (int, float, bool) else str
    default = {"": "", True: "on", False: "off"}.get(field.default, field.default)
    note = f" (default: {default})" if default != "" else ""
    option = typer.Option(
        FLAGS[setting],
        help=f"{field.description or setting}{note}",
        show_default=False,
        rich_help_panel=PANELS.get(setting.partition(".")[0], "Options"),
    )
    return inspect.Parameter(
        setting.replace(".", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _file_parameters() -> tuple[inspect.Parameter, ...]:
    file_option = typer.Option(
        "--config", "-c", metavar="FILE", help="YAML file with settings; - reads standard input"
    )
    set_option = typer.Option(
        "--set", metavar="NAME=VALUE", help="any other setting, such as gateway.max_n=4"
    )
    return (
        inspect.Parameter(
            "config_file",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, file_option],
        ),
        inspect.Parameter(
            "assignments",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[list[str] | None, set_option],
        ),
    )


def _parse_assignments(assignments: Iterable[str]) -> dict[str, object]:
    chosen: dict[str, object] = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set {assignment}: expected NAME=VALUE, such as gateway.max_n=4")
        chosen[name.strip()] = value
    return chosen
