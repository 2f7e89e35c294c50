"""Takes: rows to render anew from a chunk on, asked for with ``retry --from-chunk``.

A take gives another identity to the stage that its chunk enters and to all later ones. So they are computed anew, and
stored beside the old ones; nothing that was committed is replaced.
"""

from __future__ import annotations

from magi_ray.errors import InputError, ObjectDamaged
from magi_ray.storage import keys
from magi_ray.storage.records import new_write_id, require_readable, seal, unseal
from magi_ray.storage.store import Store, delete_command

FORMAT = 1


def read_takes(store: Store, run_id: str) -> dict[str, tuple[int, ...]]:
    """By job_id, the chunk that each take begins from, in the order they were asked for.

    Raises ObjectDamaged; InputError when a newer magi-ray wrote one.
    """
    takes: dict[str, tuple[int, ...]] = {}
    for number in _numbers(store, run_id):
        key = keys.take(run_id, number)
        try:
            take = unseal(store.get(key))
            require_readable(f"Take {number} of run {run_id}", take["format"], FORMAT)
            takes[take["job_id"]] = (*takes.get(take["job_id"], ()), int(take["from_chunk"]))
        except (ObjectDamaged, KeyError, TypeError, ValueError) as exc:
            raise ObjectDamaged(
                f"Take {number} of run {run_id} in {store.uri} is damaged.",
                remedy="Delete it; then ask for the take again, if it is still wanted.",
                next_command=delete_command(store, key),
            ) from exc
    return takes


def add_take(store: Store, run_id: str, job_id: str, from_chunk: int, *, num_chunks: int) -> int:
    """Ask to render row ``job_id`` anew from ``from_chunk`` on. Returns the number of the take, from 1, which no other
    caller gets.

    num_chunks: of the row's plan.  Raises InputError unless 0 ≤ from_chunk < num_chunks; StoreError.
    """
    if not 0 <= from_chunk < num_chunks:
        raise InputError(
            f"Job {job_id} has no chunk {from_chunk}: it has {num_chunks}, numbered from 0 to {num_chunks - 1}.",
            remedy=f"Give --from-chunk a number from 0 to {num_chunks - 1}.",
        )
    take = {"format": FORMAT, "job_id": job_id, "from_chunk": from_chunk, "write_id": new_write_id()}
    number = max(_numbers(store, run_id), default=0) + 1
    while not store.put_if_absent(keys.take(run_id, number), seal(take)):
        number += 1
    return number


def _numbers(store: Store, run_id: str) -> list[int]:
    return sorted(filter(None, map(keys.number_of, store.list(keys.takes(run_id)))))
