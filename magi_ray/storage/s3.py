"""A store in a bucket of S3, or of anything that speaks S3. All calls go through boto3, each is tried once
(``RetryingStore`` retries).

Every process's boto3 finds endpoint and credentials itself: AWS_ENDPOINT_URL, AWS_PROFILE, AWS_REGION, keys, roles.
With an endpoint of one's own the bucket is in the path of the address, with AWS in its host name.

Creating once is a put with ``If-None-Match: *``, swapping is one with ``If-Match`` and the ETag that was read; both are
single puts, since not every server honours conditions on multipart uploads. 412 means no, 409 and 500 mean try again.
Puts carry the MD5 of their bytes, so that a server refuses what was damaged on the way.
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict

import boto3
import botocore.exceptions as failures
from botocore.config import Config

from magi_ray.errors import InputError, ObjectMissing, StoreDenied, StoreError, StoreUnavailable, StoreUnwritable
from magi_ray.storage.keys import check_key, is_key
from magi_ray.storage.store import Entry, open_at

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
MULTIPART_BYTES = 8 * 2**20  # a larger file goes up in parts of this size, one after the other
MAX_PARTS = 10_000  # S3's own limit
CHUNK_BYTES = 2**20
CONNECTIONS = 32

_CONTENT_TYPES = {"mp4": "video/mp4", "json": "application/json", "parquet": "application/vnd.apache.parquet"}

_PERMISSIONS = {
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "GetObject": "s3:GetObject and s3:ListBucket (without the second, S3 says 403 of an object that is missing)",
}
_CREDENTIALS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every machine of the run."
_BAD_CREDENTIALS = {
    "InvalidAccessKeyId": "The server does not know this access key. " + _CREDENTIALS,
    "SignatureDoesNotMatch": "The secret key does not belong to the access key. " + _CREDENTIALS,
    "ExpiredToken": "The session has ended: log in again, then resume.",
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to the access key: log in again, or unset it.",
    "RequestTimeTooSkewed": "The clock of this machine is wrong: set it (timedatectl set-ntp true), then resume.",
}
_DAMAGED_ON_THE_WAY = {"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}
_TRANSIENT = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout", "NoSuchUpload"}


@dataclass(frozen=True)
class S3Store:
    """``prefix``: of every key in ``bucket``, without '/' at its ends ('' for none). Connects on the first call; each
    process makes its own client, and its threads share it. Pickles as its configuration."""

    bucket: str
    prefix: str = ""
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    read_timeout_s: float = READ_TIMEOUT_S
    # By process id, since a forked process must not use its parent's connections.
    _clients: dict[int, _Client] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.bucket, self.prefix, self.connect_timeout_s, self.read_timeout_s)

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def put(self, key: str, data: bytes) -> None:
        with self._calling(key) as client:
            client.put_object(Bucket=self.bucket, Key=self._name(key), Body=data, **_described(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._calling(key) as client:
            name, about = self._name(key), _described(key, data)
            try:
                client.put_object(Bucket=self.bucket, Key=name, Body=data, IfNoneMatch="*", **about)
            except failures.ClientError as exc:
                if _status(exc) == 412:
                    return False
                raise
            return True

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            if size <= MULTIPART_BYTES:
                self.put(key, source.read())
            else:
                self._put_parts(key, source, part_bytes=max(MULTIPART_BYTES, -(-size // MAX_PARTS)))

    def get(self, key: str) -> bytes:
        return self.get_versioned(key)[0]

    def get_to_file(self, key: str, path: Path, *, start: int = 0) -> None:
        with self._calling(key) as client:
            name = self._name(key)
            if start:
                body = client.get_object(Bucket=self.bucket, Key=name, Range=f"bytes={start}-")["Body"]
            else:  # an empty object has no range
                body = client.get_object(Bucket=self.bucket, Key=name)["Body"]
            with open_at(path, start) as target:
                for chunk in body.iter_chunks(CHUNK_BYTES):
                    target.write(chunk)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        with self._calling(key) as client:
            found = client.get_object(Bucket=self.bucket, Key=self._name(key))
            return found["Body"].read(), _version(found["ETag"])

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        # Servers differ in whether the quotation marks belong to an ETag.
        for condition in (version, f'"{version}"'):
            with self._calling(key) as client:
                try:
                    done = client.put_object(
                        Bucket=self.bucket, Key=self._name(key), Body=data, IfMatch=condition, **_described(key, data)
                    )
                except failures.ClientError as exc:
                    if _is_missing(exc):
                        return None
                    if _status(exc) != 412:
                        raise
                else:
                    return _version(done["ETag"])
            if self._version_now(key) != version:
                return None
        return None

    def _version_now(self, key: str) -> str | None:
        try:
            return self.get_versioned(key)[1]
        except ObjectMissing:
            return None

    def exists(self, key: str) -> bool:
        # Reads one byte: the error of a HEAD has no body, so a missing bucket would look like a missing object.
        with self._calling(key) as client:
            try:
                client.get_object(Bucket=self.bucket, Key=self._name(key), Range="bytes=0-0")["Body"].close()
            except failures.ClientError as exc:
                if _is_missing(exc):
                    return False
                if _status(exc) != 416:  # an empty object has no first byte
                    raise
            return True

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix, after))

    def entries(self, prefix: str, after: str = "") -> Iterator[Entry]:
        # S3 lists in UTF-8 order, which for ASCII keys is that of strings.
        if folder := prefix.rpartition("/")[0]:
            check_key(folder)
        root = self._root
        with self._calling(prefix) as client:
            pages = client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=root + prefix, StartAfter=after and root + after):
                now = _server_time(page)
                for found in page.get("Contents", []):
                    key = found["Key"].removeprefix(root)
                    if is_key(key):  # not a console's 'folder/'
                        yield Entry(key=key, size=found["Size"], age_s=_age_s(now, found["LastModified"]))

    def delete(self, key: str) -> None:
        with self._calling(key) as client:
            client.delete_object(Bucket=self.bucket, Key=self._name(key))

    def leftovers(self) -> Iterator[Entry]:
        """Multipart uploads that were begun and neither completed nor aborted; S3 does not say their sizes."""
        with self._calling("") as client:
            for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self._root):
                now = _server_time(page)
                for found in page.get("Uploads", []):
                    name = f"{found['Key'].removeprefix(self._root)}?{found['UploadId']}"
                    yield Entry(key=name, size=0, age_s=_age_s(now, found["Initiated"]))

    def sweep(self, name: str) -> None:
        key, _, upload = name.partition("?")
        if upload:
            self._abort(key, upload)

    def refuses_damage(self, key: str) -> bool:
        """Whether the server refuses a put whose bytes do not match the MD5 sent with them."""
        try:
            with self._calling(key) as client:
                client.put_object(Bucket=self.bucket, Key=self._name(key), Body=b"x", ContentMD5=_md5(b"y"))
        except StoreUnavailable as exc:
            if isinstance(exc.__cause__, failures.ClientError) and _code(exc.__cause__) in _DAMAGED_ON_THE_WAY:
                return True
            raise
        return False

    @property
    def _root(self) -> str:
        return self.prefix and f"{self.prefix}/"

    def _name(self, key: str) -> str:
        return self._root + check_key(key)

    def _put_parts(self, key: str, source: BinaryIO, *, part_bytes: int) -> None:
        # Not boto3's upload_fileobj: it sends no MD5 of the parts.
        name = self._name(key)
        with self._calling(key) as client:
            upload = client.create_multipart_upload(Bucket=self.bucket, Key=name, ContentType=_content_type(key))[
                "UploadId"
            ]
        try:
            with self._calling(key) as client:
                parts: list[CompletedPartTypeDef] = []
                while data := source.read(part_bytes):
                    number = len(parts) + 1
                    part = client.upload_part(
                        Bucket=self.bucket, Key=name, UploadId=upload, PartNumber=number, Body=data,
                        ContentMD5=_md5(data),
                    )  # fmt: skip
                    parts.append({"PartNumber": number, "ETag": part["ETag"]})
                client.complete_multipart_upload(
                    Bucket=self.bucket, Key=name, UploadId=upload, MultipartUpload={"Parts": parts}
                )
        except BaseException:
            with suppress(StoreError):  # what cannot be aborted now is one of ``leftovers``
                self._abort(key, upload)
            raise

    def _abort(self, key: str, upload: str) -> None:
        with self._calling(key) as client:
            try:
                client.abort_multipart_upload(Bucket=self.bucket, Key=self._name(key), UploadId=upload)
            except failures.ClientError as exc:
                if _code(exc) != "NoSuchUpload":
                    raise

    @contextmanager
    def _calling(self, key: str) -> Iterator[S3Client]:
        """This process's client; its errors become ours."""
        try:
            yield self._clients.setdefault(os.getpid(), _Client()).get(self)
        except (failures.ClientError, failures.BotoCoreError) as exc:
            raise self._explained(key, exc) from exc

    def _explained(self, key: str, exc: failures.ClientError | failures.BotoCoreError) -> StoreError:
        what = f"{self.uri} failed on {key or 'its root'}"
        client = self._clients[os.getpid()].made
        if client is not None:
            what += f" (at {client.meta.endpoint_url})"
        if isinstance(exc, failures.ClientError):
            return self._refused(key, what, exc)
        if isinstance(exc, _NO_CREDENTIALS):
            return StoreDenied(f"{what}: {exc}", remedy=_CREDENTIALS)
        if isinstance(exc, failures.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(exc):
            remedy = "Set AWS_CA_BUNDLE to the certificate that signs the endpoint's."
            return StoreError(f"{what}: {exc}", remedy=remedy)
        if isinstance(exc, _NO_ANSWER):
            remedy = "Check the network and AWS_ENDPOINT_URL, then resume; nothing committed is lost."
            return StoreUnavailable(f"{what}: {exc}", remedy=remedy)
        return StoreError(f"{what}: {exc}", remedy="Check the AWS_… variables and ~/.aws/config on this machine.")

    def _refused(self, key: str, what: str, exc: failures.ClientError) -> StoreError:
        status, code = _status(exc), _code(exc)
        said = f"{what}: HTTP {status} {code} from {exc.operation_name}"
        if message := exc.response.get("Error", {}).get("Message"):
            said += f", {message}"
        if code == "NoSuchBucket":
            return self._no_bucket(said)
        if _is_missing(exc):
            return ObjectMissing(f"There is no object {key} in {self.uri}")
        if code == "QuotaExceeded":
            return StoreUnwritable(said, remedy="The quota of the bucket or user is used up: raise it, then go on.")
        if status == 501:
            return StoreError(said, remedy="A store needs atomic conditional puts: AWS S3, Ceph RGW and others do.")
        if status in (408, 409, 429) or status >= 500 or code in _TRANSIENT or code in _DAMAGED_ON_THE_WAY:
            return StoreUnavailable(said, remedy="The server is busy or down: resume later; nothing committed is lost.")
        if code.removesuffix("Exception") in _BAD_CREDENTIALS:
            return StoreDenied(said, remedy=_BAD_CREDENTIALS[code.removesuffix("Exception")])
        if status in (401, 403):
            permission = _PERMISSIONS.get(exc.operation_name, f"s3:{exc.operation_name}")
            return StoreDenied(said, remedy=f"Allow these credentials {permission} on {self.uri}, or use others.")
        if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
            return StoreError(said, remedy="Set AWS_REGION to the bucket's region.")
        return StoreError(said, remedy="Check AWS_ENDPOINT_URL and AWS_REGION; is there an S3 server at that address?")

    def _no_bucket(self, said: str) -> StoreError:
        return StoreError(
            said,
            remedy=f"There is no bucket {self.bucket}: make it, with the server's own tools or so:",
            next_command=f"aws s3 mb s3://{self.bucket}",
        )


class ForeignBucket(S3Store):
    """Somebody else's bucket, to read from: any key is allowed."""

    def _name(self, key: str) -> str:
        return key

    def _no_bucket(self, said: str) -> StoreError:
        return StoreError(said, remedy="correct the address")


_NO_CREDENTIALS = (
    failures.NoCredentialsError,
    failures.PartialCredentialsError,
    failures.CredentialRetrievalError,
    failures.ProfileNotFound,
    failures.TokenRetrievalError,
    failures.SSOError,
)
_NO_ANSWER = (failures.HTTPClientError, failures.ConnectionError, failures.IncompleteReadError)


class _Client:
    """One process's client, made on first use."""

    def __init__(self) -> None:
        self.made: S3Client | None = None
        self._lock = threading.Lock()

    def get(self, store: S3Store) -> S3Client:
        with self._lock:
            if self.made is None:
                self.made = _connect(store)
            return self.made


def _connect(store: S3Store) -> S3Client:
    config = Config(
        connect_timeout=store.connect_timeout_s,
        read_timeout=store.read_timeout_s,
        tcp_keepalive=True,
        max_pool_connections=CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": 1},
        # The newer checksums are unknown to many servers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError as exc:
        remedy = "Write AWS_ENDPOINT_URL as http(s)://host:port."
        raise InputError(f"{store.uri} cannot be reached: {exc}", remedy=remedy) from exc


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


class _Described(TypedDict):
    ContentMD5: str
    ContentType: str


def _described(key: str, data: bytes) -> _Described:
    return {"ContentMD5": _md5(data), "ContentType": _content_type(key)}


def _content_type(key: str) -> str:
    """So that a browser plays a video, whatever gives it the address."""
    return _CONTENT_TYPES.get(key.rpartition(".")[2], "application/octet-stream")


def _version(etag: str) -> str:
    return etag.strip('"')


def _status(exc: failures.ClientError) -> int:
    return int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(exc: failures.ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", "without a code"))


def _is_missing(exc: failures.ClientError) -> bool:
    return _code(exc) in ("NoSuchKey", "404")


def _server_time(page: Any) -> datetime:
    return parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])


def _age_s(now: datetime, then: datetime) -> float:
    return max(0.0, (now - then).total_seconds())
