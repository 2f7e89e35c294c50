"""The S3 store against a real server (``rgw.py``); what that one cannot do wrong is in ``test_retrying.py``."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from contract import StoreContract
from rgw import Rgw

from magi_ray.errors import InputError, ObjectMissing, StoreDenied, StoreError, StoreUnavailable, StoreUnwritable
from magi_ray.storage.opening import open_store
from magi_ray.storage.probe import check_store
from magi_ray.storage.retrying import RetryingStore
from magi_ray.storage.s3 import MULTIPART_BYTES, S3Store
from magi_ray.storage.store import Store


@pytest.fixture
def store(s3_address: str) -> Store:
    return open_store(s3_address)


@pytest.fixture
def once(s3_address: str) -> S3Store:
    """The same store without another try, and with a short time-out."""
    bucket, _, prefix = s3_address.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, read_timeout_s=1.0)


class TestS3Store(StoreContract):
    pass


def test_of_16_racing_creators_exactly_one_wins(once: S3Store) -> None:
    for round_ in range(10):
        barrier = threading.Barrier(16)

        def create(racer: int, key: str = f"race/{round_}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return once.put_if_absent(key, b"%d" % racer)

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(create, range(16)))
        assert won.count(True) == 1
        assert once.get(f"race/{round_}") == b"%d" % won.index(True)


def test_a_put_that_timed_out_lands_later_and_is_known_as_ours(rgw: Rgw, once: S3Store) -> None:
    once.put_if_absent("warm", b"up")
    rgw.stop_disk()
    try:
        with pytest.raises(StoreUnavailable, match=r"a/commit.*[Rr]ead timeout"):
            once.put_if_absent("a/commit", b"write 1")
        pauses: list[float] = []

        def sleep(pause_s: float) -> None:
            pauses.append(pause_s)
            rgw.continue_disk()
            time.sleep(pause_s)

        patient = RetryingStore(once, sleep=sleep)
        assert patient.put_if_absent("b/commit", b"write 2")
    finally:
        rgw.continue_disk()
    assert pauses, "nothing timed out; the test shows nothing"
    assert once.get("b/commit") == b"write 2"
    deadline = time.monotonic() + 20
    while not once.exists("a/commit"):
        assert time.monotonic() < deadline, "the put that timed out never landed; the test shows nothing"
        time.sleep(0.1)
    assert not patient.put_if_absent("b/commit", b"write 3")


def test_a_swap_that_timed_out_is_known_as_ours(rgw: Rgw, once: S3Store) -> None:
    once.put_if_absent("lease", b"write 1")
    _, version = once.get_versioned("lease")
    rgw.stop_disk()

    def sleep(pause_s: float) -> None:
        rgw.continue_disk()
        while once.get("lease") != b"write 2":  # the first one lands before there is a second
            time.sleep(0.1)

    try:
        swapped = RetryingStore(once, sleep=sleep).swap("lease", b"write 2", version)
    finally:
        rgw.continue_disk()
    assert once.get_versioned("lease") == (b"write 2", swapped)


def test_a_server_killed_in_a_series_of_puts_loses_nothing_that_was_acknowledged(rgw: Rgw, store: Store) -> None:
    done: list[str] = []

    def put_all() -> None:
        for n in range(150):
            key = f"series/{n:03d}"
            if n % 2:
                assert store.put_if_absent(key, b"write %d" % n * 1000)
            else:
                store.put(key, b"write %d" % n * 1000)
            done.append(key)

    with ThreadPoolExecutor(1) as pool:
        series = pool.submit(put_all)
        kills, pause = 0, random.Random(5)
        while kills < 5 and not series.done():
            time.sleep(pause.uniform(0.1, 0.3))
            rgw.kill_gateway()
            kills += not series.done()
            acknowledged = list(done)
            rgw.start()
            for key in acknowledged[-20:]:
                assert store.get(key) == b"write %d" % int(key[-3:]) * 1000
        series.result()
    assert kills >= 3, "the series was over too soon; the test shows nothing"
    assert list(store.list("series/")) == done
    assert len(done) == 150


def test_what_was_acknowledged_survives_the_death_of_the_whole_cluster(rgw: Rgw, store: Store) -> None:
    for n in range(20):
        store.put_if_absent(f"a/{n}", b"%d" % n)
    rgw.kill_all()
    rgw.start()
    assert [store.get(f"a/{n}") for n in range(20)] == [b"%d" % n for n in range(20)]


def test_objects_say_what_they_are_so_that_a_browser_plays_a_video(once: S3Store, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(MULTIPART_BYTES + 1))
    once.put_file("videos/large.mp4", large)
    once.put("videos/small.mp4", b"x")
    once.put_if_absent("videos/small.json", b"{}")
    once.swap("videos/small.json", b"{} ", once.get_versioned("videos/small.json")[1])
    once.put("results.parquet", b"x")
    once.put("media/69919bea", b"x")
    client = boto3.client("s3")
    types = {
        key: client.head_object(Bucket=once.bucket, Key=f"{once.prefix}/{key}")["ContentType"] for key in once.list("")
    }
    assert types == {
        "media/69919bea": "application/octet-stream",
        "results.parquet": "application/vnd.apache.parquet",
        "videos/large.mp4": "video/mp4",
        "videos/small.json": "application/json",
        "videos/small.mp4": "video/mp4",
    }


def test_a_large_file_goes_up_in_parts_and_comes_down_whole(once: S3Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(random.Random(3).randbytes(2 * MULTIPART_BYTES + 12_345))
    once.put_file("a/large", source)
    once.get_to_file("a/large", target)
    assert target.read_bytes() == source.read_bytes()
    assert once.get_versioned("a/large")[1].endswith("-3"), "it did not go up in parts; the test shows nothing"
    assert [entry.size for entry in once.entries("a/")] == [source.stat().st_size]
    assert list(once.leftovers()) == []


def test_a_multipart_upload_that_failed_is_aborted(
    once: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").write_bytes(bytes(2 * MULTIPART_BYTES))
    digests = iter(["", "a wrong MD5"])
    monkeypatch.setattr("magi_ray.storage.s3._md5", lambda data: next(digests))
    with pytest.raises(StoreError, match="UploadPart"):
        once.put_file("a/large", tmp_path / "large")
    assert not once.exists("a/large")
    assert list(once.leftovers()) == []


def test_the_upload_of_a_killed_writer_is_left_over_and_swept(once: S3Store, s3_address: str, tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
import magi_ray.storage.s3 as s3
from magi_ray.storage.opening import open_store
digest, calls = s3._md5, []
def dying(data):
    calls.append(data)
    if len(calls) == 2:
        os.kill(os.getpid(), 9)
    return digest(data)
s3._md5 = dying
Path(sys.argv[2]).write_bytes(bytes(2 * s3.MULTIPART_BYTES))
open_store(sys.argv[1]).put_file("a/large", Path(sys.argv[2]))
"""
    once.put("a/other", b"x")
    died = subprocess.run([sys.executable, "-c", code, s3_address, str(tmp_path / "large")], timeout=60)
    assert died.returncode == -9
    [left] = once.leftovers()
    assert left.key.startswith("a/large?")
    assert 0 <= left.age_s < 120
    assert list(once.list("")) == ["a/other"]
    assert list(S3Store(once.bucket, once.prefix + "-2").leftovers()) == []
    once.sweep(left.key)
    once.sweep(left.key)
    assert list(once.leftovers()) == []


def test_more_keys_than_a_page_are_all_listed_in_order(once: S3Store, store: Store) -> None:
    keys = [f"many/{n:04d}" for n in range(1_050)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: once.put(key, b""), keys))
    assert list(store.list("many/")) == keys
    assert list(store.list("many/", after="many/0990")) == keys[991:]
    assert [entry.key for entry in store.entries("")] == keys


def test_neighbours_in_the_bucket_are_not_seen(once: S3Store) -> None:
    S3Store(once.bucket, once.prefix + "-2").put("a", b"theirs")
    S3Store(once.bucket).put(once.prefix, b"theirs")
    assert list(once.list("")) == []
    assert list(S3Store(once.bucket).list(once.prefix)) == [once.prefix, f"{once.prefix}-2/a"]


def test_a_damaged_put_is_refused_and_counts_as_transient(once: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert once.refuses_damage("probes/x")
    monkeypatch.setattr("magi_ray.storage.s3._md5", lambda data: "rL0Y20zC+Fzt72VPzMSk2A==")
    with pytest.raises(StoreUnavailable, match="HTTP 400 BadDigest"):
        once.put("a", b"x")
    assert not once.exists("a")


def test_a_pickled_store_is_the_same_store_also_in_another_process(once: S3Store) -> None:
    once.put("a", b"x")
    copy = pickle.loads(pickle.dumps(once))
    assert copy == once
    assert copy.get("a") == b"x"
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).get('a'))"
    child = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(RetryingStore(once)), capture_output=True)
    assert child.stdout == b"b'x'\n", child.stderr


def test_a_forked_process_makes_connections_of_its_own(once: S3Store) -> None:
    once.put("a", b"x")
    child = os.fork()
    if child == 0:
        os._exit(0 if once.get("a") == b"x" and len(once._clients) == 2 else 1)
    assert [once.get("a") for _ in range(20)] == [b"x"] * 20
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "HTTP 403 SignatureDoesNotMatch.*\n.*secret key does not belong"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "HTTP 403 InvalidAccessKeyId.*\n.*does not know this access key"),
        ({"AWS_PROFILE": "nobody"}, r"profile \(nobody\) could not be found\n.*AWS_PROFILE"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "locate credentials\n.*AWS_ACCESS_KEY_ID"),
    ],
)
def test_wrong_credentials_are_told_at_once_with_what_to_set(
    s3_address: str, variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(StoreDenied, match=says):
        check_store(open_store(s3_address))
    assert time.monotonic() - began < 10


def test_a_bucket_of_somebody_else_names_the_permission_that_is_missing(rgw: Rgw, s3_address: str) -> None:
    theirs = open_store(f"s3://{rgw.new_bucket('theirs')}/x")
    with pytest.raises(StoreDenied, match=r"HTTP 403 AccessDenied from PutObject(.|\n)*s3:PutObject"):
        check_store(theirs)
    with pytest.raises(StoreDenied, match="s3:ListBucket"):
        list(theirs.list(""))


def test_an_unknown_bucket_is_told_with_the_command_that_makes_it(s3_address: str) -> None:
    nowhere = open_store("s3://no-such-bucket/x")
    for ask in (
        lambda: check_store(nowhere),
        lambda: nowhere.get("a"),
        lambda: nowhere.exists("a"),
        lambda: nowhere.swap("a", b"", "version"),
        lambda: list(nowhere.list("")),
    ):
        with pytest.raises(StoreError, match=r"404 NoSuchBucket(.|\n)*aws s3 mb s3://no-such-bucket") as caught:
            ask()
        assert type(caught.value) is StoreError


@pytest.mark.usefixtures("s3_address")
def test_a_used_up_quota_is_told_as_that(rgw: Rgw) -> None:
    def fill() -> None:
        for n in range(20):
            small.put(f"a/{n}", b"x")

    small = S3Store(rgw.new_bucket())
    with rgw.quota(max_objects=2), pytest.raises(StoreUnwritable, match=r"403 QuotaExceeded.*\n.*quota .* is used up"):
        fill()


def test_nobody_at_the_address_is_unavailable_and_names_it(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = open_store(s3_address)
    assert isinstance(store, RetryingStore)
    with pytest.raises(StoreUnavailable, match=r"http://127.0.0.1:9(.|\n)*AWS_ENDPOINT_URL"):
        store.inner.get("a")


def test_a_missing_object_is_missing_whatever_else_the_bucket_holds(once: S3Store) -> None:
    with pytest.raises(ObjectMissing, match="no object a/b in s3://"):
        once.get_versioned("a/b")


# What the real server does not say when it is asked to.
ANSWERS = [
    (503, "SlowDown", StoreUnavailable, "HTTP 503 SlowDown from PutObject"),
    (429, "TooManyRequests", StoreUnavailable, "HTTP 429"),
    (500, "InternalError", StoreUnavailable, "HTTP 500"),
    (409, "ConditionalRequestConflict", StoreUnavailable, "HTTP 409"),
    (400, "RequestTimeout", StoreUnavailable, "RequestTimeout"),
    (501, "NotImplemented", StoreError, "HTTP 501 NotImplemented from PutObject.*\n.*atomic conditional puts"),
    (400, "ExpiredToken", StoreDenied, "ExpiredToken.*\n.*log in again"),
    (403, "RequestTimeTooSkewed", StoreDenied, "RequestTimeTooSkewed.*\n.*clock of this machine"),
    (403, "AccessDenied", StoreDenied, "AccessDenied.*\n.*s3:PutObject on s3://films/v1"),
    (403, "QuotaExceeded", StoreUnwritable, "QuotaExceeded.*\n.*quota"),
    (404, "NoSuchBucket", StoreError, "NoSuchBucket(.|\n)*aws s3 mb s3://films"),
    (400, "AuthorizationHeaderMalformed", StoreError, "AuthorizationHeaderMalformed.*\n.*AWS_REGION"),
    (400, "InvalidRequest", StoreError, "HTTP 400 InvalidRequest.*\n.*AWS_ENDPOINT_URL"),
]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A server that gives one answer to everything: {"status": …, "code": …, "paths": what was asked}."""
    answer: dict[str, Any] = {"status": 500, "code": "InternalError", "paths": []}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer["paths"].append(self.path)
            body = f"<Error><Code>{answer['code']}</Code><Message>so it is</Message></Error>".encode()
            self.send_response(answer["status"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://localhost:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "code", "kind", "says"), ANSWERS, ids=[code for _, code, *_ in ANSWERS])
def test_every_answer_becomes_the_error_its_caller_can_act_on(
    answering: dict[str, Any], status: int, code: str, kind: type[StoreError], says: str
) -> None:
    answering |= {"status": status, "code": code}
    store = S3Store("films", "v1")
    for act in (
        lambda: store.put("a", b"x"),
        lambda: store.put_if_absent("a", b"x"),
        lambda: store.swap("a", b"x", "version"),
    ):
        with pytest.raises(StoreError, match=says) as caught:
            act()
        assert type(caught.value) is kind
        assert caught.value.message.startswith("s3://films/v1 failed on a (at http://localhost")
    assert answering["paths"] == ["/films/v1/a"] * 3, "asked once each, with the bucket in the path"


def test_a_refused_condition_is_a_no(answering: dict[str, Any]) -> None:
    answering |= {"status": 412, "code": "PreconditionFailed"}
    store = S3Store("films", "v1")
    assert store.put_if_absent("a", b"x") is False


@pytest.mark.parametrize("quoted", [False, True])
def test_a_swap_works_whether_or_not_the_server_compares_the_quotation_marks_of_an_etag(
    quoted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneObject:
        """What S3Store asks of boto3's client, for one object."""

        def __init__(self) -> None:
            self.data = b"1"
            self.meta = SimpleNamespace(endpoint_url="here")

        def get_object(self, **_: object) -> dict[str, Any]:
            return {"Body": BytesIO(self.data), "ETag": f'"{self.data.decode()}"'}

        def put_object(self, *, Body: bytes, IfMatch: str, **_: object) -> dict[str, Any]:
            if IfMatch != (f'"{self.data.decode()}"' if quoted else self.data.decode()):
                answer: Any = {"Error": {"Code": "PreconditionFailed"}, "ResponseMetadata": {"HTTPStatusCode": 412}}
                raise ClientError(answer, "PutObject")
            self.data = Body
            return self.get_object()

    client = OneObject()
    monkeypatch.setattr("magi_ray.storage.s3._connect", lambda _: client)
    store = S3Store("films")
    assert store.swap("a", b"2", "1") == "2"
    assert store.swap("a", b"3", "1") is None
    assert client.data == b"2"


def test_an_object_gone_before_its_swap_is_a_no(answering: dict[str, Any]) -> None:
    answering |= {"status": 404, "code": "NoSuchKey"}
    assert S3Store("films", "v1").swap("a", b"x", "version") is None


def test_at_amazon_the_bucket_stands_in_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with S3Store("films", "v1")._calling("a") as client:
        url = client.generate_presigned_url("get_object", Params={"Bucket": "films", "Key": "v1/a"})
    assert url.startswith("https://films.s3")


def test_an_endpoint_that_is_no_address_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "films.example")
    with pytest.raises(InputError, match=r"Invalid endpoint.*\n.*http\(s\)://host:port"):
        S3Store("films", "v1").get("a")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://", "'' is not the name of a bucket"),
        ("s3://Films/x", "lower-case"),
        ("s3://my_films/x", "lower-case"),
        ("s3://films/a b", "is not a key"),
        ("s3://films/../x", "is not a key"),
        ("s3://films//x", "is not a key"),
        ("s3://films/.x", "is not a key"),
        ("s3://KEY:SECRET@films/x", "no keys, host or port"),
        ("s3://localhost:9000/films", "AWS_ENDPOINT_URL"),
    ],
)
def test_an_address_that_names_no_bucket_and_prefix_is_explained(uri: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        open_store(uri)
    assert "SECRET" not in str(caught.value)


def test_opening_an_address_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magi_ray.storage.s3._connect", None)
    for uri, prefix in (("s3://films", ""), ("s3://films/", ""), ("s3://films/a/b/", "a/b")):
        store = open_store(uri)
        assert store == RetryingStore(S3Store("films", prefix))
        assert store.uri == uri.rstrip("/")


def test_a_large_file_passes_through_little_memory(s3_address: str, tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from magi_ray.storage.opening import open_store
store, path = open_store(sys.argv[1]), Path(sys.argv[2])
path.write_bytes(bytes(2**20))
store.put_file("small", path)
store.get_to_file("small", path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with path.open("wb") as file:
    file.truncate(200 * 2**20)
store.put_file("large", path)
store.get_to_file("large", path)
assert path.stat().st_size == 200 * 2**20
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    child = subprocess.run(
        [sys.executable, "-c", code, s3_address, str(tmp_path / "file")], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 40, "MiB"
