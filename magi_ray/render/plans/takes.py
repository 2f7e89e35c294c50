"""Takes of a row. Take 1 is the row as it was first rendered; ``retry --from-chunk`` asks for the next one, and
``retry --take`` brings an earlier one back.

A take gives another identity to the stage that its chunk enters and to all later ones. So they are computed anew, and
stored beside the old ones; nothing that was committed is replaced, and bringing a take back computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from magi_ray.errors import InputError, ObjectDamaged, magi_ray_command
from magi_ray.storage import keys
from magi_ray.storage.records import new_write_id, require_readable, seal, unseal
from magi_ray.storage.store import Store, delete_command
from magi_ray.system import System

FORMAT = 2  # 1 knew no ``back_to``


@dataclass(frozen=True)
class BackTo:
    """A wish to go back to a ``take`` of the row, numbered from 1."""

    take: int


Wish = int | BackTo
"""What was asked of a row: to render it anew from that chunk on, or to bring a take back."""


@dataclass(frozen=True, kw_only=True)
class Take:
    """number: from 1.  from_chunk: where it begins to differ from take ``base``; None for take 1.  wishes: those up to
    the one that asked for it.  asked_unix: when, None if nobody knows."""

    number: int
    from_chunk: int | None
    base: int | None
    wishes: tuple[Wish, ...]
    asked_unix: float | None


def take_of_chunk(wishes: Sequence[Wish], chunk: int) -> int:
    """Which rendering of ``chunk`` the take in use has: 0 for the first; for one that was asked for, how many takes had
    been asked for that reach the chunk. So no two renderings of a chunk have the same number."""
    reach, in_use = 0, 0
    takes = [0]
    for wish in wishes:
        if isinstance(wish, BackTo):
            in_use = takes[min(wish.take, len(takes)) - 1]  # somebody may have deleted a damaged take
            continue
        if wish <= chunk:
            reach += 1
            in_use = reach
        takes.append(in_use)
    return in_use


def take_in_use(wishes: Sequence[Wish]) -> int:
    """The number of the take that ``wishes`` lead to."""
    last = wishes[-1] if wishes else 0
    return last.take if isinstance(last, BackTo) else 1 + sum(not isinstance(wish, BackTo) for wish in wishes)


def read_takes(store: Store, run_id: str) -> dict[str, tuple[Wish, ...]]:
    """What was asked of each row, by job_id, in the order of asking.

    Raises ObjectDamaged; InputError when a newer magi-ray wrote one.
    """
    found: dict[str, tuple[Wish, ...]] = {}
    for job_id, wish, _ in _read(store, run_id):
        found[job_id] = (*found.get(job_id, ()), wish)
    return found


def list_takes(store: Store, run_id: str, job_ids: Iterable[str], *, submitted_unix: float) -> dict[str, list[Take]]:
    """Every take of these rows. Raises as ``read_takes``."""
    first = Take(number=1, from_chunk=None, base=None, wishes=(), asked_unix=submitted_unix)
    takes = {job_id: [first] for job_id in job_ids}
    wishes: dict[str, tuple[Wish, ...]] = dict.fromkeys(takes, ())
    for job_id, wish, asked_unix in _read(store, run_id):
        if job_id not in takes:
            continue
        base, wishes[job_id] = take_in_use(wishes[job_id]), (*wishes[job_id], wish)
        if not isinstance(wish, BackTo):
            number, asked = len(takes[job_id]) + 1, wishes[job_id]
            takes[job_id].append(Take(number=number, from_chunk=wish, base=base, wishes=asked, asked_unix=asked_unix))
    return takes


def add_take(
    store: Store, run_id: str, job_id: str, from_chunk: int, *, num_chunks: int, system: System = System()
) -> int:
    """Ask to render row ``job_id`` anew from ``from_chunk`` on. Returns the number of the take.

    num_chunks: of the row's plan.  Raises InputError unless 0 ≤ from_chunk < num_chunks; StoreError.
    """
    if not 0 <= from_chunk < num_chunks:
        raise InputError(
            f"Job {job_id} has no chunk {from_chunk}: it has {num_chunks}, numbered from 0 to {num_chunks - 1}.",
            remedy=f"Give --from-chunk a number from 0 to {num_chunks - 1}.",
        )
    return _add(store, run_id, {"format": 1, "job_id": job_id, "from_chunk": from_chunk}, system)


def bring_back(store: Store, run_id: str, job_id: str, take: int, *, system: System = System()) -> None:
    """Ask for ``take`` of row ``job_id`` again. Raises InputError if there is none; StoreError."""
    count = 1 + sum(not isinstance(wish, BackTo) for wish in read_takes(store, run_id).get(job_id, ()))
    if not 1 <= take <= count:
        raise InputError(
            f"Job {job_id} has no take {take}: it has {count}, numbered from 1.",
            remedy="See which there are:",
            next_command=magi_ray_command("takes", run_id, "--job", job_id, "--store", store.uri),
        )
    _add(store, run_id, {"format": FORMAT, "job_id": job_id, "back_to": take}, system)


def _add(store: Store, run_id: str, wish: dict[str, object], system: System) -> int:
    """Write ``wish`` under a number that no other caller gets; the take that is in use then."""
    body = {**wish, "asked_unix": round(system.unix_time(), 3), "write_id": new_write_id()}
    number = max(_numbers(store, run_id), default=0) + 1
    while not store.put_if_absent(keys.take(run_id, number), seal(body)):
        number += 1
    before = [found for job, found, _ in _read(store, run_id, up_to=number) if job == wish["job_id"]]
    return take_in_use(before)


def _read(store: Store, run_id: str, *, up_to: int | None = None) -> list[tuple[str, Wish, float | None]]:
    """(job_id, wish, when) of all that was asked, in that order."""
    found: list[tuple[str, Wish, float | None]] = []
    for number in _numbers(store, run_id):
        if up_to is not None and number > up_to:
            break
        key = keys.take(run_id, number)
        try:
            body = unseal(store.get(key))
            require_readable(f"Take {number} of run {run_id}", body["format"], FORMAT)
            wish = BackTo(int(body["back_to"])) if "back_to" in body else int(body["from_chunk"])
            found.append((body["job_id"], wish, body.get("asked_unix")))
        except (ObjectDamaged, KeyError, TypeError, ValueError) as exc:
            raise ObjectDamaged(
                f"Take {number} of run {run_id} in {store.uri} is damaged.",
                remedy="Delete it; then ask for the take again, if it is still wanted.",
                next_command=delete_command(store, key),
            ) from exc
    return found


def _numbers(store: Store, run_id: str) -> list[int]:
    return sorted(filter(None, map(keys.number_of, store.list(keys.takes(run_id)))))
