"""The command line. Data goes to stdout, everything else to stderr; errors end with the next command to type.

Exit codes:
  0  done                              5  cancelled
  1  failure                           6  paused, by somebody else
  2  usage or input                    7  the store denied access
  3  invalid manifest                  8  another process renders the run, or took it over
  4  finished with failed rows       130  left rendering, or interrupted

Heavy imports are inside the commands: a wrong manifest is explained before torch would have been loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import click

from magi_ray.commands import console
from magi_ray.commands.console import command_line, print_json, say, say_next
from magi_ray.commands.doctor import doctor
from magi_ray.commands.fetch import fetch
from magi_ray.commands.look import list_command, status, watch
from magi_ray.commands.manifests import manifest
from magi_ray.commands.options import example, json_option
from magi_ray.commands.plan import plan
from magi_ray.commands.render import render
from magi_ray.commands.retry import retry, takes
from magi_ray.commands.signals import terminated_as_by_ctrl_c
from magi_ray.commands.stop import cancel, pause
from magi_ray.commands.submit import drive, resume, submit
from magi_ray.commands.upkeep import gc, verify
from magi_ray.errors import InputError, MagiRayError, ManifestError, as_magi_ray_error


class _Group(click.Group):
    """Turns whatever a command raises into a message, the next command to type, and an exit code."""

    def main(self, args: Sequence[str] | None = None, **_: Any) -> NoReturn:  # type: ignore[override]
        typed = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(args=list(typed), prog_name="magi-ray", standalone_mode=False, obj=typed)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as exc:
            click.echo(exc.format_message(), err=True)
            sys.exit(console.USAGE)
        except click.ClickException as exc:
            at = exc.ctx if isinstance(exc, click.UsageError) else None
            help_of = f"{at.command_path if at else 'magi-ray'} --help"
            _explain(InputError(exc.format_message(), next_command=help_of), typed)
            sys.exit(exc.exit_code)
        except MagiRayError as exc:
            _explain(exc, typed)
            sys.exit(exc.exit_code)
        except click.Abort:
            say("Stopped.")
            sys.exit(console.INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has gone. Without this, Python would flush once more as it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(console.FAILURE)
        except Exception as exc:  # noqa: BLE001 - the last line of defence
            error, traceback = as_magi_ray_error(exc)
            click.echo(traceback, err=True, nl=False)
            _explain(error, typed)
            sys.exit(console.FAILURE)
        sys.exit(code if isinstance(code, int) else 0)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Grouped by what people want, not alphabetically."""
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(command.name or "", command.get_short_help_str(80)) for command in commands])


def main() -> NoReturn:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no × gets a ?, not a UnicodeEncodeError.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # So that whoever stops us leaves as little behind as somebody who presses Ctrl-C.
    with terminated_as_by_ctrl_c():
        cli.main()


def _explain(error: MagiRayError, typed: Sequence[str]) -> None:
    """Say what is wrong, how to fix it, and what to type next; with --json also as an object on stdout."""
    again = command_line(typed)
    if isinstance(error, ManifestError) and any(problem.row or problem.column for problem in error.problems):
        # Not the error's own command: only the typed one has the settings that the rows were checked with.
        remedy, following = error.remedy or "Correct the rows, then run the command again.", again
    elif isinstance(error, InputError):
        remedy = error.remedy
        following = error.next_command or f"{_command_path(typed)} --help"
    else:
        remedy, following = error.remedy, error.next_command or again
    if "--json" in typed:
        problems = error.problems if isinstance(error, InputError) else ()
        content: dict[str, Any] = {
            "kind": type(error).__name__, "message": error.message, "remedy": remedy, "next_command": following,
            "problems": [asdict(problem) for problem in problems],
        }  # fmt: skip
        print_json({"error": content} | (error.json_beside if isinstance(error, ManifestError) else {}))
    first, *rest = error.message.splitlines() or [""]
    say(f"Error: {first}", style="red")
    for line in [*rest, *remedy.splitlines()]:
        say(line)
    say_next(following)


def _command_path(typed: Sequence[str]) -> str:
    """The command in ``typed``, without its arguments: ``magi-ray manifest build``."""
    path = ["magi-ray"]
    at: click.Command | None = cli
    for argument in typed:
        at = at.commands.get(argument) if isinstance(at, click.Group) else None
        if at is None:
            break
        path.append(argument)
    return " ".join(path)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("magi-ray submit manifests/quickstart.parquet"),
)
@click.version_option(package_name="magi-ray", message="%(version)s", help="Print the version.")
def cli() -> None:
    """Render long videos with MAGI-1: prompts in a table, mp4 files out, resumable anywhere."""


@cli.command(epilog=example("magi-ray version"))
@json_option
def version(as_json: bool) -> None:
    """Print the version of magi-ray."""
    from importlib.metadata import version as version_of

    installed = version_of("magi-ray")
    if as_json:
        print_json({"version": installed})
    else:
        click.echo(installed)


_SECTIONS = {
    "Render": (plan, submit, resume, retry, render, drive),
    "Look": (status, watch, list_command, takes, fetch),
    "Stop": (pause, cancel),
    "Prepare and keep": (manifest, doctor, verify, gc, version),
}

# `magi-ray validate` works too; the help shows it once.
for _command in manifest.commands.values():
    cli.add_command(_command)

for _commands in _SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)


if __name__ == "__main__":
    main()
