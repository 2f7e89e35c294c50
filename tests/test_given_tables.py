"""Tables as they are given on the command line: any kind of file, a folder, stdin, an object in a bucket."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from magi_ray.cli import cli
from magi_ray.storage.opening import open_object

PICTURE = Path(__file__).parents[1] / "manifests" / "quickstart-image.png"
ROWS = "job_id;prompt;num_chunks\na;Käfer;1\nb;sea;2\n"
SMALL = 'preset = "magi-tiny"\n[runtime]\nvideo_size_h = 32\nvideo_size_w = 32\nnum_steps = 4\n'


@pytest.fixture
def here(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, but for small.toml."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "magi-tiny").symlink_to(tiny_weights)
    monkeypatch.setenv("MAGI_RAY_CACHE", str(cache))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "small.toml").write_text(SMALL)
    return folder


def run(*words: str, stdin: bytes = b"") -> Result:
    result = CliRunner().invoke(cli, list(words), input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def planned(table: str, *, stdin: bytes = b"") -> str:
    """The digest at the end of the id of the run that would be submitted."""
    result = run("submit", table, "--dry-run", "--job", "small.toml", "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    run_id: str = json.loads(result.stdout)["run_id"]
    return run_id.rpartition("-")[2]


def test_the_same_rows_are_the_same_run_however_they_are_given(here: Path) -> None:
    (here / "rows.csv").write_text(ROWS)
    (here / "parts").mkdir()
    (here / "parts" / "0.jsonl").write_text('{"job_id": "a", "prompt": "Käfer", "num_chunks": 1}')
    (here / "parts" / "1.jsonl").write_text('{"job_id": "b", "prompt": "sea", "num_chunks": 2}')
    assert run("manifest", "build", "rows.csv", "-o", "rows.parquet").exit_code == 0

    runs = {planned(table) for table in ("rows.csv", "rows.parquet", "parts", "./parts/")}
    assert runs == {planned("-", stdin=ROWS.encode()), planned("-", stdin=(here / "rows.parquet").read_bytes())}
    assert len(runs) == 1


def test_the_kind_of_stdin_is_named_where_its_content_does_not_tell(here: Path) -> None:
    column = b"picture of, day\na, b\n"
    unclear = run("manifest", "show", "-", stdin=column)
    assert unclear.exit_code == 3
    assert "stdin is of a kind that is not recognised; name it: --format parquet|csv|" in unclear.stderr
    assert shlex.split(unclear.stderr.splitlines()[-1])[1:] == ["magi-ray", "manifest", "show", "--help"]
    named = run("manifest", "show", "-", "--format", "csv", stdin=column)
    assert "column job_id: the column is missing" in named.stderr


def test_an_address_on_the_web_is_refused_as_such(here: Path) -> None:
    result = run("validate", "https://example.com/rows.csv")
    assert result.exit_code == 2
    assert "https://example.com/rows.csv is an address that is not read." in result.stderr


def test_media_beside_stdin_start_from_the_current_folder(here: Path) -> None:
    (here / "cat.png").write_bytes(PICTURE.read_bytes())
    row = b'{"job_id": "a", "prompt": "A", "image": "%s.png"}'

    assert run("manifest", "validate", "-", stdin=row % b"cat").exit_code == 0
    assert f"put the file at {here}/dog.png" in run("manifest", "validate", "-", stdin=row % b"dog").stderr


def test_what_was_understood_of_a_table_is_noted_and_its_lines_are_named(here: Path) -> None:
    (here / "rows.csv").write_bytes(ROWS.encode("cp1252"))
    for command in (("manifest", "validate"), ("plan",), ("submit", "--dry-run")):
        result = run(*command, "rows.csv", "--job", "small.toml")
        assert result.exit_code == 0, result.stderr
        assert "note: rows.csv is not UTF-8 and was read as Windows-1252 (Latin-1)" in result.stderr

    (here / "rows.csv").write_text(ROWS + "\n\nc;;33\n;;;\n")
    for command in (("manifest", "validate"), ("manifest", "show"), ("plan",), ("submit",)):
        result = run(*command, "rows.csv", "--job", "small.toml")
        assert result.exit_code == 3
        assert (
            'row 3 (job "c"), column prompt: is missing, and there is no schedule either (rows.csv:6)' in result.stderr
        )
        assert result.stderr.splitlines()[-1] == f"next: magi-ray {' '.join(command)} rows.csv --job small.toml"


def test_an_object_in_a_bucket_is_read_and_its_media_lie_beside_it(
    here: Path, s3_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, folder = open_object(s3_address)
    bucket.put(f"{folder}/rows.jsonl", b'{"job_id": "a", "prompt": "A", "image": "in/../cat.png", "num_chunks": 1}')
    result = run("manifest", "validate", f"{s3_address}/rows.jsonl")
    assert "in/../cat.png" in result.stderr
    assert "does not exist" in result.stderr

    bucket.put(f"{folder}/cat.png", PICTURE.read_bytes())
    assert run("manifest", "validate", f"{s3_address}/rows.jsonl").exit_code == 0
    result = run("plan", f"{s3_address}/rows.jsonl", "--job", "small.toml")
    assert re.search(r"^Run rows-[0-9a-f]{10}: ", result.stderr, re.MULTILINE), result.stderr

    missing = run("plan", f"{s3_address}/none.csv")
    assert missing.exit_code == 2
    assert f"There is no object {s3_address}/none.csv." in missing.stderr


def test_a_table_is_explained_before_torch_or_ray_would_have_been_loaded(here: Path) -> None:
    (here / "rows.csv").write_text(ROWS + "c;;33\n")
    watch = "import sys; from magi_ray import cli\ntry: cli.main()\nfinally: print({'torch', 'ray'} & set(sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", watch, "submit", "rows.csv"], capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.splitlines()[-1] == "set()"
