"""Opens the store at the address that a user gives."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from magi_ray.errors import InputError
from magi_ray.storage.keys import check_key
from magi_ray.storage.local import LocalStore
from magi_ray.storage.retrying import RUN_PATIENCE_S, RetryingStore
from magi_ray.storage.store import Store

MEDIA_PATIENCE_S = 15.0  # somebody waits for the submission

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def open_store(uri: str, *, patience_s: float = RUN_PATIENCE_S) -> Store:
    """The store at ``uri``: a path, ``file:///…`` or ``s3://bucket/prefix``. Nothing is read or written yet; see
    ``check_store``.

    patience_s: how long a bucket that is out of reach is tried again.  Raises InputError for any other kind of address.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        path = Path(uri)
    elif scheme == "file":
        address = urlsplit(uri)
        if address.netloc not in ("", "localhost") or not address.path:
            remedy = "Write file:/// with three slashes, or a plain path."
            raise InputError(f"{uri} is not a local folder.", remedy=remedy)
        path = Path(unquote(address.path))
    elif scheme == "s3":
        return _in_bucket(uri, rest, patience_s)
    else:
        remedy = "Give a folder, file:///… or s3://bucket/prefix."
        raise InputError(f"{uri}: stores of kind {scheme!r} are not known.", remedy=remedy)
    if not uri:
        remedy = "Give a folder, for example --store ./magi-ray-store."
        raise InputError("The address of the store is empty.", remedy=remedy)
    # Absolute, because workers have another working directory.
    return LocalStore(root=path.expanduser().absolute())


def open_object(uri: str) -> tuple[Store, str]:
    """A store for reading the object at ``uri``, s3://bucket/key, and its key there. Any key will do.

    Raises InputError for what cannot be the name of a bucket.
    """
    bucket, _, key = uri.partition("://")[2].partition("/")
    _check_bucket(uri, bucket)
    from magi_ray.storage.s3 import ForeignBucket  # here, as below

    return RetryingStore(ForeignBucket(bucket), patience_s=MEDIA_PATIENCE_S), key


def object_uri(store: Store, key: str) -> str:
    """The whole address of an object: file:///… or s3://…."""
    root = Path(store.uri).as_uri() if Path(store.uri).is_absolute() else store.uri
    return f"{root.rstrip('/')}/{key}"


def _check_bucket(uri: str, bucket: str) -> None:
    if "@" in bucket or ":" in bucket:
        raise InputError(  # without the address, which may hold a secret
            "An s3:// address holds a bucket and a path in it, but no keys, host or port.",
            remedy="Write s3://bucket/prefix; set AWS_ENDPOINT_URL, and AWS_PROFILE or the AWS_… keys.",
        )
    if not _BUCKET.fullmatch(bucket):
        raise InputError(
            f"{uri}: {bucket!r} is not the name of a bucket.",
            remedy="Those have 3 to 63 lower-case letters, digits, '-' and '.': s3://bucket/prefix.",
        )


def _in_bucket(uri: str, rest: str, patience_s: float) -> Store:
    bucket, _, prefix = rest.partition("/")
    _check_bucket(uri, bucket)
    prefix = prefix.rstrip("/")
    try:
        if prefix:
            check_key(prefix)
    except ValueError as exc:
        raise InputError(f"{uri}: {exc}", remedy="Write s3://bucket/prefix, for example s3://films/magi-ray.") from exc
    # Here, since boto3 takes a third of a second that no other store needs.
    from magi_ray.storage.s3 import S3Store

    return RetryingStore(S3Store(bucket, prefix), patience_s=patience_s)
