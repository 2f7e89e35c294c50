"""From the address a user gives to the store behind it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from magi_ray.errors import InputError
from magi_ray.storage.local import LocalStore
from magi_ray.storage.store import Store


def open_store(uri: str) -> Store:
    """The store at ``uri``: a path or ``file:///…``. Nothing is read or written yet; see ``check_store``.

    Raises InputError for any other kind of address.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
        path = Path(uri)
    elif scheme == "file":
        address = urlsplit(uri)
        if address.netloc not in ("", "localhost") or not address.path:
            raise InputError(
                f"{uri} is not a local folder.", remedy="Write file:/// with three slashes, or a plain path."
            )
        path = Path(unquote(address.path))
    elif scheme == "s3":
        raise InputError(
            f"{uri}: S3 stores come with the next release.",
            remedy="Until then give a folder that all machines mount, for example --store /mnt/shared/magi-ray-store.",
        )
    else:
        raise InputError(f"{uri}: stores of kind {scheme!r} are not known.", remedy="Give a folder or file:///….")
    if not uri:
        raise InputError(
            "The address of the store is empty.", remedy="Give a folder, for example --store ./magi-ray-store."
        )
    # Absolute, because workers have another working directory.
    return LocalStore(root=path.expanduser().absolute())
