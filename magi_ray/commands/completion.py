"""What a shell proposes for RUN as it is typed."""

from __future__ import annotations

import time
from contextlib import suppress

import click
from click.shell_completion import CompletionItem

from magi_ray.commands.stores import default_store, store_to_read
from magi_ray.errors import MagiRayError
from magi_ray.storage import keys

# A shell waits for the answer.
PATIENCE_S = 2.0


def complete_run(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The runs of the store, of --store if that was typed before, whose ids begin so; the newest first. What cannot be
    read has none."""
    from magi_ray.render.runs.record import all_runs
    from magi_ray.storage.records import read_record

    items = []
    with suppress(MagiRayError):
        store = store_to_read(context.params.get("store_uri") or default_store(), patience_s=PATIENCE_S)
        for run_id in reversed(all_runs(store)[0]):
            if run_id.startswith(incomplete):
                record = read_record(store.get(keys.run_record(run_id)))
                submitted = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["created_unix"]))
                items.append(CompletionItem(run_id, help=f"{record['name']}, submitted {submitted}"))
        if items and "@latest".startswith(incomplete):
            items.append(CompletionItem("@latest", help="the newest run"))
    return items
