"""Options and arguments that several commands share, and the values that they become."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import click

from magi_ray.commands.completion import complete_run
from magi_ray.commands.inputs import GivenManifest
from magi_ray.commands.stores import default_store
from magi_ray.errors import SettingsError
from magi_ray.manifest.sources import KINDS
from magi_ray.settings import PRESETS, device_here, job, override, preset, published

_PATH = click.Path(path_type=Path)
_PRESETS = ", ".join(PRESETS)


def example(command: str) -> str:
    """The end of a command's help."""
    return f"\b\nExample:\n  {command}"


def manifest_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """MANIFEST and --format; the command gets ``given``."""

    @functools.wraps(command)
    def with_manifest(*args: Any, manifest: str, kind: str | None, **others: Any) -> Any:
        return command(*args, given=GivenManifest(written=manifest, kind=kind), **others)

    help_text = "The kind of table, where neither its name nor its content tells."
    with_manifest = click.option("--format", "kind", type=click.Choice(KINDS), help=help_text)(with_manifest)
    return click.argument("manifest")(with_manifest)


def run_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """RUN, see ``stores.find_run``; the command gets ``name``, None if it is not given."""
    return click.argument("name", metavar="[RUN]", required=False, shell_complete=complete_run)(command)


def store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--store", "store_uri", default=default_store, show_default="$MAGI_RAY_STORE or magi-ray-store", metavar="URI",
        help="Where runs, checkpoints and videos are kept: a folder, file:///… or s3://bucket/prefix.",
    )(command)  # fmt: skip


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")(command)


def skip_invalid_option(command: Callable[..., Any]) -> Callable[..., Any]:
    help_text = "Leave out rows with problems, render the others, and end with exit code 4."
    return click.option("--skip-invalid", is_flag=True, help=help_text)(command)


def no_wait_option(command: Callable[..., Any]) -> Callable[..., Any]:
    help_text = "Return as soon as the background process has started rendering."
    return click.option("--no-wait", is_flag=True, help=help_text)(command)


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what to render with; the command gets ``settings``."""

    @functools.wraps(command)
    def with_settings(
        *args: Any,
        job_file: Path | None,
        preset_name: str | None,
        config_file: Path | None,
        weights: Path | None,
        device: Literal["cpu", "cuda"] | None,
        **others: Any,
    ) -> Any:
        sources = {"--job": job_file, "--preset": preset_name, "--config": config_file}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise SettingsError(f"{' and '.join(given)} cannot be combined.", remedy="Give one of them.")
        if weights is not None and config_file is not None:
            remedy = "Name the folders of the weights in the config."
            raise SettingsError("--weights and --config cannot be combined.", remedy=remedy)
        if job_file is not None:
            settings = job(job_file, weights=weights)
        elif config_file is not None:
            settings = published(config_file, device=device or device_here())
        else:
            settings = preset(PRESETS[0] if preset_name is None else preset_name, weights=weights)
        if device is not None:
            settings = override(settings, {"numeric": {"device": device}}, source="--device")
        return command(*args, settings=settings, **others)

    for option in (
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to compute; default: as configured."),
        click.option("--weights", type=_PATH, metavar="FOLDER", help="Where the weights of the preset or job are."),
        click.option("--config", "config_file", type=_PATH, metavar="FILE", help="A published MAGI-1 config (JSON)."),
        click.option("--preset", "preset_name", metavar="NAME", help=f"One of {_PRESETS}; default {PRESETS[0]}."),
        click.option("--job", "job_file", type=_PATH, metavar="FILE", help="A job file (jobs/*.toml)."),
    ):
        with_settings = option(with_settings)
    return with_settings


def settings_words() -> list[str]:
    """The options of ``settings_options`` that were typed, for the command to type next."""
    params = click.get_current_context().params
    names = {"--job": "job_file", "--preset": "preset_name", "--config": "config_file", "--weights": "weights",
             "--device": "device"}  # fmt: skip
    return [word for option, name in names.items() if params[name] is not None for word in (option, str(params[name]))]


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """How to render a run: the options of ``drive``.

    local: in one process, without Ray.  dashboard: serve Ray's.  take_over: from the process that renders the run now.
    max_failed_rows: stop when more have failed.  retry_failed: try all failed rows again.  retry: these rows.
    weights: the folder of the weights on this machine, if not where they were at submission.
    """

    local: bool = False
    dashboard: bool = True
    take_over: bool = False
    max_failed_rows: int | None = None
    retry_failed: bool = False
    retry: tuple[str, ...] = ()
    weights: Path | None = None

    def argv(self) -> list[str]:
        """The same, to be typed after ``magi-ray drive RUN``."""
        argv = ["--local"] if self.local else ["--dashboard" if self.dashboard else "--no-dashboard"]
        argv += ["--take-over"] if self.take_over else []
        argv += ["--max-failed-rows", str(self.max_failed_rows)] if self.max_failed_rows is not None else []
        argv += ["--retry-failed"] if self.retry_failed else []
        argv += [argument for job_id in self.retry for argument in ("--retry", job_id)]
        return argv + (["--weights", str(self.weights.absolute())] if self.weights is not None else [])

    def again(self) -> list[str]:
        """Those that a command needs that goes on with the run later."""
        argv = replace(self, dashboard=True, take_over=False, retry_failed=False, retry=()).argv()
        argv = [argument for argument in argv if argument != "--dashboard"]
        return argv if self.dashboard or self.local else [*argv, "--no-dashboard"]


def render_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of all commands that render a run; the command gets ``options``, which also hold those of its own
    options that are fields of ``RenderOptions``."""

    @functools.wraps(command)
    def with_options(*args: Any, **values: Any) -> Any:
        chosen = {field.name: values.pop(field.name) for field in fields(RenderOptions) if field.name in values}
        return command(*args, options=RenderOptions(**chosen), **values)

    for option in (
        click.option(
            "--max-failed-rows", type=click.IntRange(min=0), metavar="N", help="Stop once more than N rows have failed."
        ),
        click.option("--take-over", is_flag=True, help="Take the run over from the process that renders it now."),
        click.option("--dashboard/--no-dashboard", default=True, show_default=True, help="Serve the Ray dashboard."),
        click.option("--local", is_flag=True, help="Render without Ray, in one process."),
    ):
        with_options = option(with_options)
    return with_options


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """RUN, --store and the options of rendering, for commands that go on with a run. --weights, since these may be
    elsewhere on this machine, is one of ``options``."""
    help_text = "Where the weights are on this machine; default: where they were at submission."
    weights = click.option("--weights", type=_PATH, metavar="FOLDER", help=help_text)
    return run_argument(store_option(weights(render_options(command))))
