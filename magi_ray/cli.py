"""The command line. Data goes to stdout, everything else to stderr; errors end with the next command to type.

Exit codes: 0 done · 1 failure · 2 usage or input · 3 invalid manifest · 4 finished with failed rows · 130 interrupted.
Heavy imports are inside the commands: a wrong manifest is explained before torch would have been found.
"""

from __future__ import annotations

import difflib
import fcntl
import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NoReturn

import click
from rich.console import Console, RenderableType

from magi_ray import __version__
from magi_ray.errors import InputError, MagiRayError, ManifestError, RunNotFound, SettingsError
from magi_ray.settings import PRESETS, Settings, cache_folder, device_here, job, override, preset, published

if TYPE_CHECKING:
    from magi_ray.render.journal import Outcome
    from magi_ray.render.progress import RunProgress
    from magi_ray.render.run import Run
    from magi_ray.storage.store import Store

DEFAULT_STORE = "magi-ray-store"
FAILURE, USAGE, FAILED_ROWS, INTERRUPTED = 1, 2, 4, 130
_SOURCES = (".jsonl", ".csv", ".yaml", ".yml")


class _Group(click.Group):
    """Turns whatever a command raises into a message, the next command to type, and an exit code."""

    def main(self, args: Sequence[str] | None = None, **_: Any) -> NoReturn:  # type: ignore[override]
        typed = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(args=list(typed), prog_name="magi-ray", standalone_mode=False, obj=typed)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as exc:
            click.echo(exc.format_message(), err=True)
            sys.exit(USAGE)
        except click.ClickException as exc:
            at = exc.ctx if isinstance(exc, click.UsageError) else None
            help_of = f"{at.command_path if at else 'magi-ray'} --help"
            _explain(InputError(exc.format_message(), next_command=help_of), typed)
            sys.exit(exc.exit_code)
        except MagiRayError as exc:
            _explain(exc, typed)
            sys.exit(exc.exit_code)
        except click.Abort:
            _say("Stopped.")
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has gone. Python would try to flush once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILURE)
        except Exception as exc:  # noqa: BLE001 - the last line of defence
            if isinstance(exc, OSError) and exc.filename is not None:
                _explain(MagiRayError(f"{exc.filename}: {exc.strerror}.", remedy="Mend that, then go on."), typed)
            else:
                traceback.print_exc()
                _explain(MagiRayError("This is a bug in magi-ray; please report it with the lines above."), typed)
            sys.exit(FAILURE)
        sys.exit(code if isinstance(code, int) else 0)


def main() -> NoReturn:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no × gets a ?, not a UnicodeEncodeError.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    cli.main()


def _explain(error: MagiRayError, typed: Sequence[str]) -> None:
    """Say what is wrong, how to mend it, and what to type next; with --json also as an object on stdout."""
    again = shlex.join(["magi-ray", *typed])
    if isinstance(error, ManifestError) and any(problem.row or problem.column for problem in error.problems):
        # Not the error's own: only the typed command has the settings that the rows were checked against.
        remedy, following = error.remedy or "Correct the rows, then type the command again.", again
    elif isinstance(error, ManifestError):
        remedy, following = error.remedy, "magi-ray manifest build --help"
    elif isinstance(error, InputError):
        remedy = error.remedy
        following = error.next_command or f"{_command_path(typed)} --help"
    else:
        remedy, following = error.remedy, error.next_command or again
    if "--json" in typed:
        content: dict[str, Any] = {
            "kind": type(error).__name__, "message": error.message, "remedy": remedy, "next_command": following
        }  # fmt: skip
        if isinstance(error, ManifestError):
            content["problems"] = [asdict(problem) for problem in error.problems]
        _print_json({"error": content})
    first, *rest = error.message.splitlines() or [""]
    _say(f"Error: {first}", style="red")
    for line in [*rest, *remedy.splitlines()]:
        _say(line)
    _say(f"next: {following}", style="bold")


def _command_path(typed: Sequence[str]) -> str:
    """The words of ``typed`` that name a command."""
    words = ["magi-ray"]
    at: click.Group = cli
    for word in typed:
        command = at.commands.get(word)
        if command is None:
            break
        words.append(word)
        if not isinstance(command, click.Group):
            break
        at = command
    return " ".join(words)


def _example(command: str) -> str:
    """The end of a command's help."""
    return f"\b\nExample:\n  {command}"


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_example("magi-ray submit manifests/quickstart.parquet"),
)
def cli() -> None:
    """Render long videos with MAGI-1: prompts in a Parquet manifest, mp4 files out, resumable anywhere."""


def _store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--store", "store_uri", default=DEFAULT_STORE, show_default=True, metavar="URI",
        help="Where everything durable lives: a folder or file:///….",
    )(command)  # fmt: skip


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")(command)


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
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


def _ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--dashboard/--no-dashboard", default=True, show_default=True, help="Serve the Ray dashboard."),
        click.option("--local", is_flag=True, help="Render in this process, without Ray."),
    ):
        command = option(command)
    return command


# Runs -----------------------------------------------------------------------------------------------------------


@cli.command(epilog=_example("magi-ray submit manifests/quickstart.parquet --store ./magi-ray-store"))
@click.argument("manifest", type=click.Path(path_type=Path))
@_store_option
@_settings_options
@_ray_options
@click.option("--no-wait", is_flag=True, help="Render in the background and return at once.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be rendered, write nothing.")
@_json_option
@click.pass_obj
def submit(
    typed: list[str],
    manifest: Path,
    store_uri: str,
    settings: Settings,
    local: bool,
    dashboard: bool,
    no_wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Render every row of MANIFEST into a video. What exists already is not rendered again."""
    from magi_ray.manifest import Defaults, read_manifest

    _require_manifest(manifest, typed)
    # Rows first: this takes a moment, what follows loads torch.
    read_manifest(manifest, Defaults.of(settings))
    store = _store_to_write(store_uri)
    from magi_ray.render.run import create, prepare

    run, files = prepare(manifest.read_bytes(), name=str(manifest), base=manifest.parent, settings=settings)
    for note in run.manifest.notes:
        _say(f"note: {note}", style="yellow")
    if dry_run:
        _dry_run(store, run, as_json=as_json)
        return
    _check(store)
    if create(store, run, files):
        _say(f"Run {run.run_id}: {_count(len(run.plans), 'video')}, settings {settings.name}, store {store.uri}")
        _note_made_weights(settings)
    elif not _all_published(store, run):
        _say(f"Run {run.run_id} was submitted before; going on with it.")
    if no_wait and not _all_published(store, run):
        _detach(store, run, store_uri, local=local, dashboard=dashboard, as_json=as_json)
        return
    _carry_out(store, run, local=local, dashboard=dashboard, as_json=as_json, again=_command("resume", run, store_uri))


@cli.command(epilog=_example("magi-ray resume quickstart"))
@click.argument("run_id", metavar="RUN")
@_store_option
@_ray_options
@_json_option
@click.option("--claimed", type=int, hidden=True, help="The open claim that `submit --no-wait` hands down.")
def resume(run_id: str, store_uri: str, local: bool, dashboard: bool, as_json: bool, claimed: int | None) -> None:
    """Go on with RUN where it stopped, on this machine or another. RUN: its id, or the beginning of it."""
    store = _store_to_read(store_uri)
    run = _open_run(store, run_id, "resume", store_uri)
    _carry_out(
        store, run, local=local, dashboard=dashboard, as_json=as_json, claimed=claimed,
        again=_command("resume", run, store_uri),
    )  # fmt: skip


@cli.command(epilog=_example("magi-ray status quickstart"))
@click.argument("run_id", metavar="RUN")
@_store_option
@_json_option
def status(run_id: str, store_uri: str, as_json: bool) -> None:
    """How far RUN is, video by video. RUN: its id, or the beginning of it."""
    from magi_ray.report import status_table

    store = _store_to_read(store_uri)
    run = _open_run(store, run_id, "status", store_uri)
    progress, running, age_s = _progress(store, run)
    if as_json:
        _print_json(_state(progress, running, age_s))
        return
    _out(status_table(progress))
    if running:
        _say("Rendering." if age_s is None else f"Rendering; last heard of {age_s:.0f} s ago.")
        _say(f"next: {_command('watch', run, store_uri)}", style="bold")
    else:
        _say_ended(store, run, progress, store_uri)


@cli.command(name="list", epilog=_example("magi-ray list --store ./magi-ray-store"))
@_store_option
@_json_option
def list_command(store_uri: str, as_json: bool) -> None:
    """The runs in the store, oldest first."""
    from magi_ray.render.run import list_runs
    from magi_ray.report import runs_table

    store = _store_to_read(store_uri)
    lines = [_summary(store, run_id) for run_id in list_runs(store)]
    if as_json:
        _print_json({"runs": lines})
    elif lines:
        _out(runs_table(lines))
    else:
        _say(f"The store at {store.uri} holds no runs.")
        _say("next: magi-ray submit --help", style="bold")


@cli.command(epilog=_example("magi-ray watch quickstart"))
@click.argument("run_id", metavar="RUN")
@_store_option
@_json_option
def watch(run_id: str, store_uri: str, as_json: bool) -> None:
    """Follow RUN, which another process renders, until it ends. Ctrl-C stops watching, not rendering."""
    from magi_ray.report import follow

    store = _store_to_read(store_uri)
    run = _open_run(store, run_id, "watch", store_uri)
    with follow(_stderr()) as show:
        while True:
            progress, running, age_s = _progress(store, run)
            show(progress)
            if not running:
                break
            time.sleep(1)
    if as_json:
        _print_json(_state(progress, running, age_s))
    sys.exit(_say_ended(store, run, progress, store_uri))


@cli.command(epilog=_example('magi-ray render --prompt "a boat on calm water" --num-chunks 4 -o boat.mp4'))
@click.option("--prompt", required=True, metavar="TEXT", help="What is to be seen.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The mp4 to write.")
@click.option("--num-chunks", type=int, metavar="N", help="Length in chunks of 24 frames.")
@click.option("--seconds", type=float, metavar="S", help="Length in seconds, rounded up to whole chunks.")
@click.option("--image", type=click.Path(path_type=Path), metavar="FILE", help="Begin from this image.")
@click.option("--video", type=click.Path(path_type=Path), metavar="FILE", help="Go on from this video.")
@click.option("--width", type=int, metavar="N", help="Pixels, a multiple of 16.")
@click.option("--height", type=int, metavar="N", help="Pixels, a multiple of 16.")
@click.option("--fps", type=int, metavar="N", help="Frames per second.")
@click.option("--seed", type=int, metavar="N", help="The noise; the same seed gives the same video.")
@click.option("--num-steps", type=int, metavar="N", help="Denoising steps of each chunk.")
@_store_option
@_settings_options
@_json_option
@click.pass_obj
def render(
    typed: list[str],
    /,
    prompt: str,
    out: Path,
    image: Path | None,
    video: Path | None,
    store_uri: str,
    settings: Settings,
    as_json: bool,
    **values: int | float | None,
) -> None:
    """Render one video without a manifest, in this process. Interrupted and typed again, it goes on."""
    from magi_ray.manifest import Defaults, manifest_of
    from magi_ray.storage import keys

    _require_place(out, typed)
    begin = {"image": None if image is None else str(image), "video": None if video is None else str(video)}
    row = {"job_id": "video", "prompt": prompt} | begin | values
    with _as_options():
        manifest = manifest_of([row], Defaults.of(settings), base=Path.cwd(), name="the options of render")
    store = _store_to_write(store_uri)
    from magi_ray.render.run import create, prepare

    with _as_options():
        run, files = prepare(manifest.parquet(), name=out.name, base=Path.cwd(), settings=settings)
    _check(store)
    if create(store, run, files):
        _note_made_weights(settings)

    def deliver() -> dict[str, Any]:
        part = out.with_name(f".{out.name}.part")
        try:
            store.get_to_file(keys.video(run.run_id, "video"), part)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
        return {"out": str(out)}

    _carry_out(
        store, run, local=True, dashboard=False, as_json=as_json, deliver=deliver,
        again=shlex.join(["magi-ray", *typed]),
    )  # fmt: skip


@cli.command(epilog=_example("magi-ray version"))
@_json_option
def version(as_json: bool) -> None:
    """The version of magi-ray."""
    if as_json:
        _print_json({"version": __version__})
    else:
        click.echo(__version__)


# Manifests ------------------------------------------------------------------------------------------------------


@cli.group(epilog=_example("magi-ray manifest validate manifests/quickstart.parquet"))
def manifest() -> None:
    """Build, check and show manifests."""


@manifest.command(epilog=_example("magi-ray manifest build manifests/quickstart.jsonl -o manifests/my.parquet"))
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="What to write.")
@click.option("--no-check", is_flag=True, help="Write rows that break rules too; types are always checked.")
@_settings_options
@_json_option
@click.pass_obj
def build(
    typed: list[str],
    rows: Path,
    out: Path,
    no_check: bool,
    settings: Settings,
    as_json: bool,
) -> None:
    """Build a manifest, FILE.parquet, from ROWS: .jsonl, .csv or .yaml. Media paths start from its folder."""
    from magi_ray.manifest import Defaults, build_manifest

    _require_file(rows, _SOURCES, typed)
    count = build_manifest(rows, out, defaults=None if no_check else Defaults.of(settings))
    if as_json:
        _print_json({"manifest": str(out), "rows": count, "checked": not no_check})
    else:
        click.echo(str(out))
    _say(f"{_count(count, 'row')}, {'not checked' if no_check else 'all valid'}.")
    _say(f"next: magi-ray {'manifest validate' if no_check else 'submit'} {shlex.quote(str(out))}", style="bold")


@manifest.command(epilog=_example("magi-ray manifest validate manifests/quickstart.parquet"))
@click.argument("path", metavar="MANIFEST", type=click.Path(path_type=Path))
@_settings_options
@_json_option
@click.pass_obj
def validate(
    typed: list[str],
    path: Path,
    settings: Settings,
    as_json: bool,
) -> None:
    """Check every row of MANIFEST; exit code 3 if any is invalid."""
    from magi_ray.manifest import Defaults, read_manifest

    _require_manifest(path, typed)
    checked = read_manifest(path, Defaults.of(settings))
    for note in checked.notes:
        _say(f"note: {note}", style="yellow")
    if as_json:
        _print_json({"manifest": str(path), "rows": len(checked.rows), "notes": checked.notes})
    _say(f"{path}: {_count(len(checked.rows), 'row')}, all valid.")
    _say(f"next: {shlex.join(['magi-ray', 'submit', *_without(typed[2:], '--json')])}", style="bold")


@manifest.command(epilog=_example("magi-ray manifest show manifests/quickstart.parquet"))
@click.argument("path", metavar="MANIFEST", type=click.Path(path_type=Path))
@_settings_options
@_json_option
@click.pass_obj
def show(
    typed: list[str],
    path: Path,
    settings: Settings,
    as_json: bool,
) -> None:
    """The rows of MANIFEST with the run's defaults filled in."""
    from magi_ray.manifest import Defaults, read_manifest, table_for_show
    from magi_ray.report import manifest_table

    _require_manifest(path, typed)
    rows = table_for_show(read_manifest(path, Defaults.of(settings)))
    if as_json:
        _print_json({"rows": rows})
    else:
        _out(manifest_table(rows))


# What commands are given ----------------------------------------------------------------------------------------


def _require_manifest(path: Path, typed: list[str]) -> None:
    if path.suffix.lower() in _SOURCES and path.is_file():
        built = path.with_suffix(".parquet")
        if built.is_file():
            remedy, following = f"Did you mean {built}?", _instead(typed, path, built)
        else:
            remedy = "Build a manifest of it first."
            following = shlex.join(["magi-ray", "manifest", "build", str(path), "-o", str(built)])
        raise InputError(f"{path} is not a Parquet file.", remedy=remedy, next_command=following)
    _require_file(path, (".parquet",), typed)


def _require_file(path: Path, suffixes: Sequence[str], typed: list[str]) -> None:
    """Raises InputError unless ``path`` is a file; suggests the likeliest neighbour that ends in ``suffixes``."""
    if path.is_file():
        return
    folder = path if path.is_dir() else path.parent
    try:
        neighbours = sorted(str(found) for found in folder.iterdir() if found.suffix.lower() in suffixes)
    except OSError:
        neighbours = []
    # In a folder without one of that name, whatever is there is likelier than nothing.
    [close] = difflib.get_close_matches(str(path), neighbours, n=1, cutoff=0) or [""]
    fault = f"{path} is a folder, not a file." if path.is_dir() else f"There is no file {path}."
    if path.exists() and not path.is_dir():
        fault = f"{path} is not an ordinary file."
    if not close:
        raise InputError(fault, remedy=f"Give the path of a file that ends in {', '.join(suffixes)}.")
    raise InputError(fault, remedy=f"Did you mean {close}?", next_command=_instead(typed, path, Path(close)))


def _instead(typed: list[str], old: Path, new: Path) -> str:
    """The typed command with another path in it."""
    words = [
        prefix + str(new) if Path(word.removeprefix(prefix)) == old else word
        for word in typed
        for prefix in [next((p for p in ("--out=", "-o") if word.startswith(p) and word != p), "")]
    ]
    return shlex.join(["magi-ray", *words])


def _require_place(out: Path, typed: list[str]) -> None:
    """Raises InputError unless ``out`` can be written as an mp4 file, before anything is rendered for it."""
    again = ""
    if out.is_dir():
        fault, remedy = f"{out} is a folder.", "Name a file in it."
        place = out / "video.mp4"
    elif out.suffix.lower() != ".mp4":
        fault, remedy = f"{out} does not end in .mp4.", "Only mp4 files are written."
        place = out.with_name(f"{out.name}.mp4")
    elif not out.absolute().parent.is_dir():
        fault, remedy, place = f"There is no folder {out.parent}.", "Make it, or write somewhere else.", out
        again = f"mkdir -p {shlex.quote(str(out.parent))}"
    elif not os.access(out.absolute().parent, os.W_OK):
        fault, remedy, place = f"The folder {out.absolute().parent} cannot be written.", "Write elsewhere.", out
    else:
        return
    raise InputError(fault, remedy=remedy, next_command=again if place == out else _instead(typed, out, place))


@contextmanager
def _as_options() -> Iterator[None]:
    """What is wrong with the one row of ``render``, in the words of its options."""
    try:
        yield
    except ManifestError as exc:
        lines = [
            f"--{problem.column.replace('_', '-')}: {problem.value} {problem.rule}; {problem.remedy}"
            for problem in exc.problems
        ]
        raise InputError("\n".join(lines)) from exc


def _note_made_weights(settings: Settings) -> None:
    if settings.weights.made_in is not None:
        _say("note: these weights are made, not trained: videos will not show their prompts.", style="yellow")


# The store and its runs -----------------------------------------------------------------------------------------


def _store_to_read(uri: str) -> Store:
    """The store at ``uri``, which must be there. Nothing is written."""
    from magi_ray.storage.local import LocalStore
    from magi_ray.storage.opening import open_store

    store = open_store(uri)
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


def _store_to_write(uri: str) -> Store:
    """The store at ``uri``, as far as one can tell without writing; ``_check`` does the rest."""
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


def _check(store: Store) -> None:
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


def _open_run(store: Store, run_id: str, verb: str, store_uri: str) -> Run:
    """The run of that id, or the only one whose id begins so. Raises RunNotFound with what it could have meant."""
    from magi_ray.render.run import list_runs, open_run

    known = list_runs(store)
    # A path, as the shell completes it, names the run by its last part.
    wanted = run_id if run_id in known else Path(run_id).name
    fitting = [known_id for known_id in known if wanted and known_id.startswith(wanted)]
    if wanted in known or len(fitting) == 1:
        return open_run(store, wanted if wanted in known else fitting[0])
    fitting = fitting[-5:] or difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
    at = _at(store_uri)
    if not fitting:
        remedy = f"It holds {', '.join(known[-5:])}." if known else "It holds no runs."
        following = f"magi-ray list{at}"
    else:
        remedy = f"Did you mean {' or '.join(fitting)}?"
        following = f"magi-ray {verb} {fitting[-1]}{at}"
    count = f"{len(fitting)} runs begin with" if len(fitting) > 1 else "There is no run"
    raise RunNotFound(f"{count} {run_id!r} in {store.uri}.", remedy=remedy, next_command=following)


def _all_published(store: Store, run: Run) -> bool:
    from magi_ray.render.finish import published as published_video

    return all(published_video(store, run.run_id, plan) is not None for plan in run.plans.values())


def _summary(store: Store, run_id: str) -> dict[str, Any]:
    """A run in one line, without planning it: a video counts as done when its record, written last, is there."""
    from pyarrow import BufferReader, parquet

    from magi_ray.render.journal import STALE_S, read_progress
    from magi_ray.render.progress import Phase
    from magi_ray.storage import keys

    record = json.loads(store.get(keys.run_record(run_id)))
    videos = parquet.read_metadata(BufferReader(store.get(keys.run_manifest(run_id)))).num_rows
    done = {
        key.removeprefix(keys.videos(run_id)).removesuffix(".json")
        for key in store.list(keys.videos(run_id))
        if key.endswith(".json")
    }
    noted = read_progress(store, run_id)
    failed = [] if noted is None else [v.job_id for v in noted[0].videos.values() if v.phase is Phase.FAILED]
    here = _rendered_here(store, run_id)
    return {
        "run_id": run_id,
        "submitted": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["created_unix"])),
        "videos": videos,
        "done": len(done),
        "failed": len(set(failed) - done),
        "running": here or (here is None and noted is not None and noted[1] and time.time() - noted[2] < STALE_S),
        "settings": record["settings"]["name"],
    }


def _progress(store: Store, run: Run) -> tuple[RunProgress, bool, float | None]:
    """How far ``run`` is, whether it is being rendered, and how many seconds ago its driver last noted progress.

    While it is rendered the driver's notes are the newest; otherwise the store is asked for what it holds.
    """
    from magi_ray.media.encoder import encoder_identity, find_ffmpeg
    from magi_ray.render.inventory import take_stock
    from magi_ray.render.journal import STALE_S, read_progress
    from magi_ray.render.progress import RunProgress

    noted = read_progress(store, run.run_id)
    age_s = None if noted is None else max(0.0, time.time() - noted[2])
    here = _rendered_here(store, run.run_id)
    if noted is not None and noted[1] and age_s is not None and here is not False and (here or age_s < STALE_S):
        return noted[0], True, age_s
    encoder = encoder_identity(find_ffmpeg())
    rows = [take_stock(store, run.run_id, plan, encoder) for plan in run.plans.values()]
    fresh = RunProgress.of(run.run_id, rows, {job_id: plan.forwards_per_stage for job_id, plan in run.plans.items()})
    if noted is not None:
        fresh.keep_failures(noted[0])
    return fresh, bool(here), age_s


def _state(progress: RunProgress, running: bool, age_s: float | None) -> dict[str, Any]:
    return progress.as_json() | {"running": running, "seconds_since_update": age_s}


def _say_ended(store: Store, run: Run, progress: RunProgress, store_uri: str) -> int:
    """What to know of a run that is not being rendered; the exit code that fits it."""
    from magi_ray.render.progress import Phase
    from magi_ray.storage import keys

    left = [video for video in progress.videos.values() if video.phase is not Phase.DONE]
    if not left:
        _say(f"All videos are done: {store.uri.rstrip('/')}/{keys.videos(run.run_id)}")
        return 0
    failed = sum(video.phase is Phase.FAILED for video in left)
    if failed == len(left):
        _say(f"Finished; {failed} of {_count(len(progress.videos), 'video')} failed.")
    else:
        _say(f"Not being rendered here; {len(left)} of {_count(len(progress.videos), 'video')} not done.")
    log = _traces(store, run.run_id, "log")
    if log.exists():
        _say(f"The last process in the background wrote to {log}.")
    _say(f"next: {_command('resume', run, store_uri)}", style="bold")
    return FAILED_ROWS if failed == len(left) else FAILURE


# Rendering ------------------------------------------------------------------------------------------------------


def _carry_out(
    store: Store,
    run: Run,
    *,
    local: bool,
    dashboard: bool,
    as_json: bool,
    again: str,
    claimed: int | None = None,
    deliver: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Render what is left and say how it ended. Exits with 4 when rows failed, 130 when interrupted.

    again: the command that goes on if this does not end well.  claimed: the run's claim, if it is held already.
    deliver: called when all videos are done; gives what --json is to say of it.
    """
    begun = time.monotonic()
    try:
        with _claim(store, run.run_id, claimed):
            outcome = _render(store, run, local=local, dashboard=dashboard)
    except KeyboardInterrupt:
        if as_json:
            _print_json({"run_id": run.run_id, "interrupted": True, "next_command": again})
        _say("Stopped. What was committed is kept.")
        _say(f"next: {again}", style="bold")
        sys.exit(INTERRUPTED)
    delivered = {} if deliver is None or outcome.failed else deliver()
    _end(store, run, outcome, time.monotonic() - begun, as_json=as_json, again=again, delivered=delivered)


def _render(store: Store, run: Run, *, local: bool, dashboard: bool) -> Outcome:
    from magi_ray.report import follow

    if _all_published(store, run):
        # Neither Ray nor torch is needed to say so.
        from magi_ray.media.encoder import encoder_identity, find_ffmpeg
        from magi_ray.render.inventory import take_stock
        from magi_ray.render.journal import Journal

        encoder = encoder_identity(find_ffmpeg())
        return Journal(store, run, [take_stock(store, run.run_id, p, encoder) for p in run.plans.values()]).close()
    if local:
        from magi_ray.render.local import render_here

        with follow(_stderr()) as show:
            return render_here(store, run, observe=show)
    from magi_ray.cluster.driver import render_on_ray
    from magi_ray.cluster.resources import local_ray

    _say("Starting Ray on this machine …")
    with local_ray(namespace=f"magi-ray/{run.run_id}", dashboard=dashboard) as url:
        if url:
            _say(f"Ray dashboard: {url}")
        with follow(_stderr()) as show:
            return render_on_ray(store, run, observe=show)


def _end(
    store: Store,
    run: Run,
    outcome: Outcome,
    seconds: float,
    *,
    as_json: bool,
    again: str,
    delivered: Mapping[str, Any],
) -> None:
    from magi_ray.storage import keys

    videos = {job: f"{store.uri.rstrip('/')}/{keys.video(run.run_id, job)}" for job in outcome.published}
    if as_json:
        _print_json(
            {
                "run_id": run.run_id,
                "videos": videos,
                "failed": [{"job_id": f.job_id, "class": f.failure, "message": f.message} for f in outcome.failed],
                "stages_rendered": outcome.stages_rendered,
                "stages_reused": outcome.stages_reused,
                "seconds": round(seconds, 1),
                **delivered,
            }
        )
    else:
        for path in delivered.values() or videos.values():
            click.echo(path)
    if outcome.already_published == len(run.plans):
        _say(f"Nothing to render: {_count(len(run.plans), 'video')} of run {run.run_id} published before.")
    else:
        _say(
            f"{len(outcome.published)} of {_count(len(run.plans), 'video')} published in {seconds:.0f} s; "
            f"{_count(outcome.stages_rendered, 'stage')} rendered, {outcome.stages_reused} reused."
        )
    if outcome.failed:
        for failure in outcome.failed:
            first, *rest = failure.message.splitlines() or [""]
            _say(f"{failure.job_id} failed ({failure.failure}, {failure.kind}): {first}", style="red")
            for line in rest:
                _say(f"  {line}")
        _say(f"next: {again}", style="bold")
        sys.exit(FAILED_ROWS)


def _dry_run(store: Store, run: Run, *, as_json: bool) -> None:
    from magi_ray.media.encoder import encoder_identity, find_ffmpeg
    from magi_ray.render.inventory import take_stock
    from magi_ray.report import dry_run_table

    encoder = encoder_identity(find_ffmpeg())
    lines: list[dict[str, Any]] = []
    for plan in run.plans.values():
        row = take_stock(store, run.run_id, plan, encoder)
        left = row.num_stages - row.stages_done
        if row.published:
            what = "reuse"
        elif row.stages_done:
            what = f"resume at stage {row.stages_done + 1}" if left else "decode and join"
        else:
            what = "render"
        lines.append(
            {
                "job_id": plan.job_id,
                "plan": what,
                "frames": plan.timeline.num_frames,
                "stages": row.num_stages,
                "stages_left": left,
                "steps_left": left * plan.forwards_per_stage,
            }
        )
    if as_json:
        _print_json({"run_id": run.run_id, "videos": lines})
    else:
        _out(dry_run_table(lines))
    left = sum(line["stages_left"] for line in lines)
    steps = sum(line["steps_left"] for line in lines)
    _say(
        f"Run {run.run_id}: {_count(left, 'stage')} to render, {_count(steps, 'denoising step')}. Nothing was written."
    )


def _detach(store: Store, run: Run, store_uri: str, *, local: bool, dashboard: bool, as_json: bool) -> None:
    """Go on in a process of its own that outlives this one and its terminal."""
    command = [sys.executable, "-m", "magi_ray.cli", "resume", run.run_id, "--store", store_uri]
    command += ["--local"] if local else ["--dashboard" if dashboard else "--no-dashboard"]
    log = _traces(store, run.run_id, "log")
    with _claim(store, run.run_id) as claim, log.open("ab") as output:
        # The claim goes from hand to hand: from now on until that process is gone the run counts as being rendered.
        handed = [] if claim is None else [claim.fileno()]
        process = subprocess.Popen(
            command + [word for handle in handed for word in ("--claimed", str(handle))],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=handed,
        )  # fmt: skip
        if claim is not None:
            _sign(claim, process.pid)
    # It is to outlive us; without this, Python warns of that.
    process.returncode = 0
    if as_json:
        _print_json({"run_id": run.run_id, "pid": process.pid, "log": str(log)})
    _say(f"Rendering in the background, process {process.pid}; its log is {log}.")
    _say(f"next: {_command('watch', run, store_uri)}", style="bold")


@contextmanager
def _claim(store: Store, run_id: str, held: int | None = None) -> Iterator[IO[str] | None]:
    """Holds the run's claim on this machine, so that no second process does the same work and others can tell that
    this one lives: the system lets go of it however the process ends. held: a handle of it from our parent.

    Raises InputError while another process has it.
    """
    if held is not None:
        os.set_inheritable(held, False)
        yield None
        return
    path = _traces(store, run_id, "claim")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as claim:
        for _attempt in range(10):
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)  # `status` holds it for an instant when it looks
            except OSError:
                break  # a file system without locks: work done twice is harmless
        else:
            claim.seek(0)
            raise InputError(
                f"Run {run_id} is being rendered already, by process {claim.read().strip() or 'unknown'}.",
                remedy="Watch it, or stop that process first.",
                next_command=f"magi-ray watch {run_id} --store {shlex.quote(store.uri)}",
            )
        _sign(claim, os.getpid())
        yield claim


def _sign(claim: IO[str], pid: int) -> None:
    claim.seek(0)
    claim.truncate()
    claim.write(f"{pid}\n")
    claim.flush()


def _rendered_here(store: Store, run_id: str) -> bool | None:
    """Whether a process of this machine renders the run now; None: none ever did, so another machine may."""
    try:
        with _traces(store, run_id, "claim").open() as claim:
            fcntl.flock(claim, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _traces(store: Store, run_id: str, kind: Literal["claim", "log"]) -> Path:
    """Where this machine keeps the claim and the log of a run. The same id may be in several stores."""
    where = hashlib.sha256(store.uri.encode()).hexdigest()[:8]
    return cache_folder() / "runs" / where / f"{run_id}.{kind}"


# Words ----------------------------------------------------------------------------------------------------------


def _command(verb: str, run: Run, store_uri: str) -> str:
    return f"magi-ray {verb} {run.run_id}{_at(store_uri)}"


def _at(store_uri: str) -> str:
    return "" if store_uri == DEFAULT_STORE else f" --store {shlex.quote(store_uri)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _without(words: Sequence[str], unwanted: str) -> list[str]:
    return [word for word in words if word != unwanted]


def _stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def _say(text: str, *, style: str = "") -> None:
    _stderr().print(text, style=style or None, soft_wrap=True)


def _out(renderable: RenderableType) -> None:
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


def _print_json(content: Mapping[str, Any]) -> None:
    click.echo(json.dumps(content))


if __name__ == "__main__":
    main()
