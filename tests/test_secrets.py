"""No secret leaves: what stands in an address is neither shown nor stored."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from magi_ray.cli import cli
from magi_ray.errors import ManifestError, MediaError, Problem, StoreError, as_magi_ray_error
from magi_ray.events import Task, TaskFailed, TaskKind
from magi_ray.manifest import write_manifest
from magi_ray.redaction import redact
from magi_ray.render.driving.worker import Worker
from magi_ray.storage.memory import MemoryStore

SECRET = "plant/ed+S3cret"
QUOTED = "plant%2Fed%2BS3cret"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"Could not connect to http://user:{SECRET}@host:9000/a?b=1", "Could not connect to http://***@host:9000/a?b=1"),
        (f'"https://{QUOTED}@host"', '"https://***@host"'),
        (f"s3://AKIA:{SECRET}@films/a and s3://films/b", "s3://***@films/a and s3://films/b"),
        ("http://u:p@ss@host", "http://***@host"),
        (f"https://h/k?X-Amz-Credential=AKIA%2F1&X-Amz-Signature={QUOTED}&x=1",
         "https://h/k?X-Amz-Credential=***&X-Amz-Signature=***&x=1"),
        (f"https://h/k?AWSAccessKeyId=a&Signature={SECRET}", "https://h/k?AWSAccessKeyId=***&Signature=***"),
        (f"https://h/k?token={QUOTED}#top", "https://h/k?token=***#top"),
        *[(text, text) for text in (
            "/films/a@b file:///a@b", "s3://films/a:b@c", "http://host:8080/a@b", "write to me@example.org, seed=3",
        )],
    ],
)  # fmt: skip
def test_addresses_lose_their_secrets_and_nothing_else(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


def test_no_error_holds_one_however_it_is_shown_or_sent() -> None:
    address = f"http://user:{SECRET}@host"
    problem = Problem(row=1, column="image", value=address, rule="is no file", remedy="give one")
    for error in (
        StoreError(address, remedy=address, next_command=f"magi-ray list --store {address}"),
        MediaError.about(address, f"cannot be read from {address}"),
        ManifestError(address, [problem], next_command=address),
    ):
        for each in (error, pickle.loads(pickle.dumps(error))):
            assert SECRET not in f"{each} {each!r} {each.args} {vars(each)}"
    _, traceback = as_magi_ray_error(ValueError(f"Invalid endpoint: {address}"))
    assert "http://***@host" in traceback
    assert SECRET not in traceback


def test_a_workers_log_and_its_events_hold_none(capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> None:
        try:
            raise OSError(f"cannot reach http://user:{SECRET}@proxy")
        except OSError as exc:
            raise ValueError(f"http://user:{SECRET}@host") from exc

    worker = Worker(TaskKind.EMBED, "embed-0", store=MemoryStore(), run_id="r", epoch=1, load=load)  # type: ignore[arg-type]
    [failed] = worker.carry_out(None, Task(kind=TaskKind.EMBED, job_id="a"), 1)  # type: ignore[arg-type]
    assert isinstance(failed, TaskFailed)
    assert failed.message == "ValueError: http://***@host"
    log = capsys.readouterr().err
    assert "http://***@proxy" in log
    assert SECRET not in log


def give_up(_patience: object, error: Exception) -> None:
    raise error


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where nobody answers; with a password in the address that the environment gives."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{QUOTED}@{address}")
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "AKIAPLANTED"),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", "a"),
        ):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        monkeypatch.setattr("magi_ray.storage.retrying._Patience.wait", give_up)
        yield address


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_nothing_that_a_command_prints_or_leaves_behind_holds_one(
    as_json: list[str], endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGI_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    signed = f"s3://films/cat.png?X-Amz-Signature={QUOTED}"
    write_manifest([{"job_id": "a", "prompt": "sea", "image": signed}], Path("signed.parquet"))
    write_manifest([{"job_id": "a", "prompt": "sea", "image": f"https://u:{SECRET}@h/c.png"}], Path("web.parquet"))
    write_manifest([{"job_id": "a", "prompt": "sea", "width": 7}], Path("bad.parquet"))
    store, with_keys = "s3://films/x", f"s3://AKIAPLANTED:{SECRET}@films/x"
    Path("broken.parquet").write_bytes(b"x")
    for words in (
        ("list", "--store", store), ("status", "r", "--store", store), ("doctor", "--store", store),
        ("verify", "--store", store), ("gc", "--store", store), ("cancel", "r", "--store", store),
        ("list", "--store", with_keys), ("submit", "bad.parquet", "--store", with_keys),
        ("submit", "broken.parquet", "--store", with_keys), ("doctor", "--store", with_keys),
        ("plan", "signed.parquet", "--store", store), ("plan", "web.parquet", "--store", with_keys),
        ("submit", f"https://h/rows.parquet?X-Amz-Signature={QUOTED}", "--store", store),
    ):  # fmt: skip
        told = CliRunner().invoke(cli, [*words, *as_json])
        assert told.exit_code not in (0, None), words
        assert isinstance(told.exception, SystemExit), told.exception
        said = told.stdout + told.stderr
        for secret in (SECRET, QUOTED, "AKIAPLANTED"):
            assert secret not in said, (words, said)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.parent != tmp_path:  # the manifests are the user's own
            assert not any(secret.encode() in path.read_bytes() for secret in (SECRET, QUOTED))
