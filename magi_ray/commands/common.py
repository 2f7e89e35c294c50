"""What the commands share: their options, opening stores and runs, and how they speak."""

from __future__ import annotations

import difflib
import functools
import json
import os
import shlex
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console, RenderableType

from magi_ray.errors import InputError, MagiRayError, RunNotFound, SettingsError
from magi_ray.settings import PRESETS, Settings, device_here, job, override, preset, published

if TYPE_CHECKING:
    from magi_ray.render.runs.record import Run
    from magi_ray.storage.store import Store

# Somebody waits for the answer, and may type again.
PATIENCE_S = 15.0
DEFAULT_STORE = "magi-ray-store"
# 3, 7 and 8 come with errors of their own, see ``errors``.
FAILURE, USAGE, FAILED_ROWS, CANCELLED, PAUSED, INTERRUPTED = 1, 2, 4, 5, 6, 130


def as_ours(exc: Exception) -> tuple[MagiRayError, str]:
    """What to tell people of ``exc``; and its traceback, if it is a bug, else ''."""
    if isinstance(exc, MagiRayError):
        return exc, ""
    if isinstance(exc, OSError) and exc.filename is not None:
        return MagiRayError(f"{exc.filename}: {exc.strerror}.", remedy="Mend that, then go on."), ""
    bug = MagiRayError("This is a bug in magi-ray; please report it with the lines above.")
    return bug, "".join(traceback.format_exception(exc))


def example(command: str) -> str:
    """The end of a command's help."""
    return f"\b\nExample:\n  {command}"


def store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--store", "store_uri", default=DEFAULT_STORE, show_default=True, metavar="URI",
        help="Where everything durable lives: a folder, file:///… or s3://bucket/prefix.",
    )(command)  # fmt: skip


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")(command)


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
            raise SettingsError(f"{' and '.join(given)} stand beside each other.", remedy="Give one of them.")
        if weights is not None and config_file is not None:
            raise SettingsError(
                "--weights stands beside --config.", remedy="Name the folders of the networks in that file."
            )
        if job_file is not None:
            settings = job(job_file, weights=weights)
        elif config_file is not None:
            settings = published(config_file, device=device or device_here())
        else:
            settings = preset(PRESETS[0] if preset_name is None else preset_name, weights=weights)
        if device is not None:
            settings = override(settings, {"numeric": {"device": device}}, source="--device")
        return command(*args, settings=settings, **others)

    path = click.Path(path_type=Path)
    for option in (
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to compute; default: as set."),
        click.option("--weights", type=path, metavar="FOLDER", help="Where the networks of a preset or job lie."),
        click.option("--config", "config_file", type=path, metavar="FILE", help="A published MAGI-1 config (JSON)."),
        click.option(
            "--preset", "preset_name", metavar="NAME", help=f"One of {', '.join(PRESETS)}; default {PRESETS[0]}."
        ),
        click.option("--job", "job_file", type=path, metavar="FILE", help="A job file (jobs/*.toml)."),
    ):
        with_settings = option(with_settings)
    return with_settings


def note_made_weights(settings: Settings) -> None:
    if settings.weights.made_in is not None:
        say("note: these weights are made, not trained: videos will not show their prompts.", style="yellow")


def store_to_read(uri: str, *, patience_s: float = PATIENCE_S) -> Store:
    """The store at ``uri``, which must be there. Nothing is written. ``patience_s``: with a bucket out of reach."""
    from magi_ray.storage.local import LocalStore
    from magi_ray.storage.opening import open_store

    store = open_store(uri, patience_s=patience_s)
    if isinstance(store, LocalStore):
        _require_folder(store.root)
        if not store.root.exists():
            raise InputError(
                f"There is no store at {store.root}.",
                remedy="Give the folder that the run was submitted to, with --store, or go where it was submitted.",
                next_command="magi-ray list" if uri != DEFAULT_STORE and Path(DEFAULT_STORE).is_dir() else "",
            )
        if not os.access(store.root, os.R_OK | os.X_OK):
            raise InputError(f"The store at {store.root} cannot be read.", remedy="Allow this user to read it.")
    return store


def store_to_write(uri: str) -> Store:
    """The store at ``uri``, as far as one can tell without writing; ``check`` does the rest."""
    from magi_ray.storage.local import LocalStore
    from magi_ray.storage.opening import open_store

    store = open_store(uri)
    if isinstance(store, LocalStore):
        _require_folder(store.root)
        above = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(
                f"The store at {store.root} cannot be written: {above} belongs to somebody else.",
                remedy="Choose another folder with --store.",
            )
    return store


def check(store: Store) -> None:
    """Only when the run is sure to be written: this leaves a folder behind."""
    from magi_ray.storage.probe import check_store

    check_store(store)


def _require_folder(root: Path) -> None:
    for part in (root, *root.parents):
        if part.exists() and not part.is_dir():
            raise InputError(
                f"The store {root} cannot be: {part} is a file, not a folder.",
                remedy="Choose another folder with --store.",
            )


def open_named_run(store: Store, run_id: str, verb: str, store_uri: str, *, weights: Path | None = None) -> Run:
    """The run of that id, or the only one whose id begins so. Raises RunNotFound with what it could have meant.

    weights: where its networks lie on this machine, if not where they lay at submission.
    """
    from magi_ray.render.runs.record import open_run

    return open_run(store, find_run(store, run_id, verb, store_uri), weights=weights)


def find_run(store: Store, run_id: str, verb: str, store_uri: str) -> str:
    """The id that ``run_id`` is or begins; it may be that of a damaged run. Raises RunNotFound."""
    from magi_ray.render.runs.record import all_runs
    from magi_ray.storage import keys

    # A path, as the shell completes it, names the run by its last part.
    wanted = Path(run_id).name
    # A whole id takes one call: listing all runs may take longer than cancelling one may.
    with suppress(ValueError):
        if store.exists(keys.run_record(wanted)):
            return wanted
    known, damaged = all_runs(store)
    fitting = [known_id for known_id in known if wanted and known_id.startswith(wanted)]
    if len(fitting) == 1:
        return fitting[0]
    if wanted in damaged:
        return wanted
    fitting = fitting[-5:] or difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
    at = at_store(store_uri)
    if not fitting:
        remedy = f"It holds {', '.join(known[-5:])}." if known else "It holds no runs."
        following = f"magi-ray list{at}"
    else:
        remedy = f"Did you mean {' or '.join(fitting)}?"
        following = f"magi-ray {verb} {fitting[-1]}{at}"
    count = f"{len(fitting)} runs begin with" if len(fitting) > 1 else "There is no run"
    raise RunNotFound(f"{count} {run_id!r} in {store.uri}.", remedy=remedy, next_command=following)


def command_line(verb: str, run: Run, store_uri: str) -> str:
    return f"magi-ray {verb} {run.run_id}{at_store(store_uri)}"


def retry_line(run: Run, store_uri: str) -> str:
    return f"magi-ray retry {run.run_id} --failed{at_store(store_uri)}"


def at_store(store_uri: str) -> str:
    return "" if store_uri == DEFAULT_STORE else f" --store {shlex.quote(store_uri)}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def without(words: Sequence[str], unwanted: str) -> list[str]:
    return [word for word in words if word != unwanted]


def stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str, *, style: str = "") -> None:
    stderr().print(text, style=style or None, soft_wrap=True)


def out(renderable: RenderableType) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        console.print(renderable)
        return
    # A pipe or a file gets whole lines, however narrow Rich takes it to be, and no spaces to fill them.
    console.width = 4096
    with console.capture() as captured:
        console.print(renderable)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def print_json(content: Mapping[str, Any]) -> None:
    click.echo(json.dumps(content))
