"""Every key of the store. What an operator sees in the folder or bucket:

<root>/
├── stages/<kk>/<key>/                 one denoising stage; <key> is the stage's identity, <kk> its first two digits
│   ├── commit.json                    create-only, written last; without it (or with a damaged payload) nothing counts
│   ├── state-<write>.safetensors      the window: the latents in flight
│   └── chunk-<write>.safetensors      the clean latent this stage completed, if any
├── segments/<kk>/<key>/
│   ├── commit.json
│   └── segment-<write>.mp4            the encoded video of one chunk
├── texts/<kk>/<key>/
│   ├── commit.json
│   └── text-<write>.safetensors       the embedding of one caption
├── prefixes/<kk>/<key>/
│   ├── commit.json
│   └── prefix-<write>.safetensors     the latents of one row's image or video
├── media/<kk>/<sha256>                a row's image or video as submitted, under the digest of its bytes
├── probes/                            what a check of the store writes, and deletes again
└── runs/<run>/
    ├── run.json                       create-only: what was submitted
    ├── manifest.parquet               the manifest as submitted
    ├── epoch/<000001>.json            create-only: each driver takes the next one; the highest is the run's driver
    ├── lease.json                     swapped: the driver that renders the run now, with a count that it raises
    ├── wanted.json                    overwritten: a request to pause or cancel the run
    ├── jobs/<job_id>/lease.json       swapped: the group that denoises the row now, likewise
    ├── takes/<0001>.json              create-only: a row to render anew from a chunk on, or a take to bring back
    ├── progress.json                  overwritten as the run goes on; may be lost
    ├── results.parquet                one row per video
    ├── errors.parquet                 one row per failure
    └── videos/<job_id>.mp4  <job_id>.json     the video and what made it

<write> is the id of one attempt to write, so no two attempts share a payload's name. "Swapped" is compare-and-swap,
"create-only" put-if-absent. Names that begin with a dot are the stores' own; no key does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

CommitKind = Literal["stage", "segment", "text", "prefix"]


@dataclass(frozen=True, kw_only=True)
class CommitLayout:
    """How commits of one kind are stored. ``roles``: those its payloads may have."""

    folder: str
    suffix: str
    roles: frozenset[str]


# Stages stand before segments: garbage collection reads in this order, and stages tell which segments are needed.
COMMITS: Mapping[CommitKind, CommitLayout] = {
    "stage": CommitLayout(folder="stages", suffix="safetensors", roles=frozenset({"state", "chunk"})),
    "segment": CommitLayout(folder="segments", suffix="mp4", roles=frozenset({"segment"})),
    "text": CommitLayout(folder="texts", suffix="safetensors", roles=frozenset({"text"})),
    "prefix": CommitLayout(folder="prefixes", suffix="safetensors", roles=frozenset({"prefix"})),
}

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[A-Za-z0-9._=-]{1,255}")

_SPREAD_NAME = r"(?P<two>[0-9a-f]{2})/(?P=two)[0-9a-f]{62}"
_RUN_FOLDER = r"runs/(?P<run>[^/]+)/"
# Every kind of object and what its name looks like: the tree above. Whatever fits none is another program's.
KINDS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in [
        *((f"{kind} commit", rf"{of.folder}/{_SPREAD_NAME}/commit\.json") for kind, of in COMMITS.items()),
        *(
            (f"{kind} {role}", rf"{of.folder}/{_SPREAD_NAME}/{role}-[^/]+\.{of.suffix}")
            for kind, of in COMMITS.items()
            for role in sorted(of.roles)
        ),
        ("media", rf"media/{_SPREAD_NAME}"),
        ("probe", r"probes/[^/.].*"),
        ("run record", _RUN_FOLDER + r"run\.json"),
        ("manifest", _RUN_FOLDER + r"manifest\.parquet"),
        ("epoch", _RUN_FOLDER + r"epoch/(?P<number>[0-9]{6,18})\.json"),
        ("run lease", _RUN_FOLDER + r"lease\.json"),
        ("request", _RUN_FOLDER + r"wanted\.json"),
        ("row lease", _RUN_FOLDER + r"jobs/[^/]+/lease\.json"),
        ("take", _RUN_FOLDER + r"takes/(?P<number>[0-9]{4,18})\.json"),
        ("progress", _RUN_FOLDER + r"progress\.json"),
        ("results", _RUN_FOLDER + r"results\.parquet"),
        ("errors", _RUN_FOLDER + r"errors\.parquet"),
        ("video", _RUN_FOLDER + r"videos/(?P<job>[^/]+)\.mp4"),
        ("video record", _RUN_FOLDER + r"videos/(?P<job>[^/]+)\.json"),
    ]
}

RUNS = "runs/"
MEDIA = "media/"
PROBES = "probes/"


def check_key(key: str) -> str:
    """``key``, if it is valid: parts of letters, digits and ``. _ - =`` joined by '/', none of them '.' or '..', and no
    leading dot, which is the stores' own. Raises ValueError otherwise. A key is never also the folder of another one.
    """
    parts = key.split("/")
    if not all(_PART.fullmatch(part) for part in parts) or {".", ".."} & set(parts) or key.startswith("."):
        raise ValueError(f"{key!r} is not a key: relative parts of letters, digits and . _ - = joined by '/'")
    return key


def is_key(name: str) -> bool:
    """Whether ``name`` is a valid key. Other programs put other names into a folder or bucket."""
    with suppress(ValueError):
        return bool(check_key(name))
    return False


def commits(kind: CommitKind) -> str:
    """Prefix of everything of one kind."""
    return f"{COMMITS[kind].folder}/"


def commit_folder(kind: CommitKind, key: str) -> str:
    """Where one commit and its payloads lie. ``key``: 64 hex digits of a sha256, else ValueError."""
    return f"{commits(kind)}{_spread(key)}/"


def commit(kind: CommitKind, key: str) -> str:
    return f"{commit_folder(kind, key)}commit.json"


def commit_of(name: str) -> str:
    """The key of the commit that the object ``name`` belongs to; '' for what other programs put there."""
    parts = name.split("/")
    return parts[2] if len(parts) == 4 and kind_of(name) else ""


def kind_of(name: str) -> str:
    """Which of ``KINDS`` the object ``name`` is of; '' for what other programs put there."""
    return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(name)), "")


def run_of(name: str) -> str:
    """The run whose folder the object ``name`` is in; '' for what other programs put there, and for a manifest: a run
    with nothing else is being submitted, or its submission died."""
    if name.startswith(RUNS) and kind_of(name) not in ("", "manifest"):
        return name.split("/")[1]
    return ""


def number_of(name: str) -> int | None:
    """The number of an epoch or take; None for what other programs put there."""
    found = KINDS["epoch"].fullmatch(name) or KINDS["take"].fullmatch(name)
    return int(found["number"]) if found else None


def job_of(name: str) -> str:
    """The row whose video or video's record ``name`` is; '' for what other programs put there."""
    found = KINDS["video"].fullmatch(name) or KINDS["video record"].fullmatch(name)
    return found["job"] if found else ""


def payload_name(kind: CommitKind, role: str, write_id: str) -> str:
    """The name of a payload beside its commit. Raises ValueError for a role that this kind does not have."""
    if role not in COMMITS[kind].roles:
        raise ValueError(f"a {kind} has {', '.join(sorted(COMMITS[kind].roles))}, but no {role}")
    return f"{role}-{write_id}.{COMMITS[kind].suffix}"


def probe(write_id: str) -> str:
    """Prefix of what one check of the store writes."""
    return f"{PROBES}{write_id}/"


def media(sha256: str) -> str:
    """An image or video that a row begins with. Raises ValueError for what is not a sha256."""
    return f"{MEDIA}{_spread(sha256)}"


def run(run_id: str) -> str:
    """Prefix of everything of one run."""
    return f"{RUNS}{run_id}/"


def run_record(run_id: str) -> str:
    return f"{run(run_id)}run.json"


def run_manifest(run_id: str) -> str:
    return f"{run(run_id)}manifest.parquet"


def run_progress(run_id: str) -> str:
    return f"{run(run_id)}progress.json"


def run_results(run_id: str) -> str:
    return f"{run(run_id)}results.parquet"


def run_errors(run_id: str) -> str:
    return f"{run(run_id)}errors.parquet"


def epochs(run_id: str) -> str:
    """Prefix of the epochs of a run."""
    return f"{run(run_id)}epoch/"


def epoch(run_id: str, number: int) -> str:
    return f"{epochs(run_id)}{number:06d}.json"


def run_lease(run_id: str) -> str:
    return f"{run(run_id)}lease.json"


def row_lease(run_id: str, job_id: str) -> str:
    return f"{run(run_id)}jobs/{job_id}/lease.json"


def run_wanted(run_id: str) -> str:
    return f"{run(run_id)}wanted.json"


def takes(run_id: str) -> str:
    """Prefix of the takes of a run."""
    return f"{run(run_id)}takes/"


def take(run_id: str, number: int) -> str:
    return f"{takes(run_id)}{number:04d}.json"


def videos(run_id: str) -> str:
    """Prefix of a run's finished videos."""
    return f"{run(run_id)}videos/"


def video(run_id: str, job_id: str) -> str:
    return f"{videos(run_id)}{job_id}.mp4"


def video_record(run_id: str, job_id: str) -> str:
    return f"{videos(run_id)}{job_id}.json"


def _spread(sha256: str) -> str:
    """``<kk>/<sha256>``: spread over 256 folders, since folders of a million entries are slow to list."""
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"{sha256!r} is not the 64 hex digits of a sha256")
    return f"{sha256[:2]}/{sha256}"
