"""The images and clips that rows begin from, as files on this machine while their run is prepared."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from pathlib import Path

from magi_ray.errors import InputError, MediaError, MediaMissing, ObjectMissing, StoreError, StoreUnavailable
from magi_ray.manifest.rules import is_a_file
from magi_ray.storage.opening import open_object
from magi_ray.storage.store import Store
from magi_ray.system import telling_no_room, temporary_folder


class MediaFiles(dict[str, Path]):
    """Files by the sha256 of their contents. Those that ``fetch`` downloaded are deleted with this object."""

    def __init__(self) -> None:
        super().__init__()
        self._folder: Path | None = None
        self._fetched: dict[str, Path | MediaError] = {}
        self._buckets: dict[str, Store] = {}

    def fetch(self, location: str) -> Path:
        """The file at ``location``: a path, or s3://bucket/key, which is downloaded once, from any bucket.

        Raises MediaMissing; MediaError if it is no file or may not be read; StoreUnavailable, OSError.
        """
        if not location.lower().startswith("s3://"):
            path = Path(location)
            for broken in is_a_file(path):
                error = MediaMissing if broken.missing else MediaError
                raise error.about(path, broken.rule, remedy=broken.remedy)
            return path
        if location not in self._fetched:
            try:
                self._fetched[location] = self._download(location)
            except StoreUnavailable:
                raise
            except ObjectMissing:
                remedy = "upload it, or correct the address"
                self._fetched[location] = MediaMissing.about(location, "does not exist", remedy=remedy)
            except (InputError, StoreError) as exc:
                reason = f"cannot be read ({exc.message})"
                self._fetched[location] = MediaError.about(location, reason, remedy=exc.remedy)
        found = self._fetched[location]
        if isinstance(found, MediaError):
            raise found
        return found

    def _download(self, location: str) -> Path:
        if self._folder is None:
            open_until_then = ExitStack()
            self._folder = open_until_then.enter_context(temporary_folder())
            weakref.finalize(self, open_until_then.close)
        bucket, key = open_object(location)
        path = self._folder / str(len(self._fetched))
        # One client for each bucket: making one takes longer than downloading an image.
        with telling_no_room():
            self._buckets.setdefault(bucket.uri, bucket).get_to_file(key, path)
        return path
