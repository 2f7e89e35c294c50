"""Tables that would take all memory or time are told, within seconds and below 1 GB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MB = 10**6
PLAIN = {"use_dictionary": False, "write_statistics": False}
SCHEDULE = pa.struct([("start_chunk", pa.int64()), ("prompt", pa.string())])


def parquet(path: Path, columns: Any, **options: Any) -> None:
    pq.write_table(pa.table(columns), path, **({"compression": "zstd"} | options))


def repeated(text: str, count: int) -> pa.Array:
    """``count`` times ``text``, which is there once."""
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), pa.array([text]))


def entries(prompts: pa.Array) -> pa.Array:
    """One schedule of all ``prompts``."""
    items = pa.StructArray.from_arrays([pa.array(range(len(prompts))), prompts], names=["start_chunk", "prompt"])
    return pa.ListArray.from_arrays(pa.array([0, len(prompts)], pa.int32()), items)


def names(count: int) -> list[str]:
    return [str(n) for n in range(count)]


def laughs(first: str, more: str) -> str:
    """YAML in which each line holds the one before nine times."""
    lines = [f"- &a {first}", *(f"- &{chr(98 + n)} {more}".replace("*", f"*{chr(97 + n)}") for n in range(8))]
    return "\n".join(lines)


def sheet(path: Path, rows: str) -> None:
    """A workbook whose sheet is this XML."""
    book = openpyxl.Workbook()
    book.save(path.with_suffix(".plain"))
    opening = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
    with zipfile.ZipFile(path.with_suffix(".plain")) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name in plain.namelist():
            content = f"{opening}{rows}</sheetData></worksheet>".encode() if "sheet1" in name else plain.read(name)
            out.writestr(name, content)
    path.with_suffix(".plain").unlink()


# By file name: how it is made, and what is said of it.
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one text.parquet": (
        lambda path: parquet(path, {"job_id": ["a"], "prompt": ["x" * 270 * MB]}, **PLAIN),
        "column prompt: ",
    ),
    "one text in each row.parquet": (
        lambda path: parquet(path, {"job_id": names(100_000), "prompt": repeated("x" * MB, 100_000)}),
        "column prompt: ",
    ),
    "one text in a column of one's own.parquet": (
        lambda path: parquet(path, {"job_id": names(100_000), "note": repeated("x" * MB, 100_000)}),
        "column note: ",
    ),
    "one text in each entry.parquet": (
        lambda path: parquet(path, {"job_id": ["a"], "schedule": entries(repeated("x" * MB, 100_000))}),
        "column schedule: ",
    ),
    "one text in differences.parquet": (
        lambda path: parquet(
            path, {"job_id": names(400), "prompt": ["x" * MB] * 400},
            **PLAIN, column_encoding={"prompt": "DELTA_BYTE_ARRAY"},
        ),
        "column prompt: ",
    ),
    "entries.parquet": (
        lambda path: parquet(path, {"job_id": ["a"], "schedule": entries(pa.array(["A"] * MB))}),
        'row 1 (job "a"), column schedule: has 1,000,000 entries, but a schedule has at most',
    ),
    "nulls.parquet": (lambda path: parquet(path, {"job_id": pa.nulls(50 * MB, pa.int8())}), "has 50000000 rows"),
    "columns.parquet": (
        lambda path: parquet(path, {name: ["a"] for name in names(20_000)}),
        "has 20000 columns",
    ),
    "a footer.parquet": (
        lambda path: path.write_bytes(b"PAR1" + bytes(9 * MB) + (9 * MB).to_bytes(4, "little") + b"PAR1"),
        "is described in 9000000 bytes",
    ),
    "columns.csv": (lambda path: path.write_text(",".join(names(MB))), "there are 1000000 columns"),
    "rows.csv": (lambda path: path.write_text("job_id\n" + "a\n" * 2 * MB), "has 200001 rows"),
    "bytes.csv": (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**12), "has 1000000000000 bytes"),
    "sparse.jsonl": (
        lambda path: path.write_text("\n".join(json.dumps({f"column {n % 900}": n}) for n in range(20_000))), "values"
    ),
    "digits.json": (
        lambda path: path.write_text('[{"job_id": "a", "prompt": "A", "seed": ' + "9" * 100_000 + "}]"),
        'row 1 (job "a"), column seed: "999999',
    ),
    "digits.yaml": (
        lambda path: path.write_text("- job_id: a\n  prompt: A\n  seed: " + "9" * 100_000),
        'row 1 (job "a"), column seed: "999999',
    ),
    "length.csv": (
        lambda path: path.write_text("job_id,prompt,seconds,num_chunks\na,A,1e300,\nb,B,,1e999999999\n"),
        "column num_chunks: ",
    ),
    "deep.json": (lambda path: path.write_text("[" * 100_000), "line 1: is nested too deeply"),
    "deep.jsonl": (lambda path: path.write_text('\n{"x": ' + "[" * 100 + "]" * 100 + "}"), "line 2: "),
    "deep cell.csv": (
        lambda path: path.write_text("job_id,tags\na," + "[" * 100_000), 'column tags: "[['
    ),
    "deep.yaml": (lambda path: path.write_text("- a\n- " + "[" * 100_000), "line 2: lists and maps are nested"),
    "entries.jsonl": (
        lambda path: path.write_text(json.dumps({"job_id": "a", "schedule": [{"prompt": "A"}] * 100_000})),
        'row 1 (job "a"), column schedule: has 100,000 entries',
    ),
    "small values.json": (lambda path: path.write_text('[{"x": [' + "[]," * 7 * MB + "[]]}]"), "has 7000002 values"),
    "laughs.yaml": (
        lambda path: path.write_text(laughs("[x, x, x, x, x, x, x, x, x]", "[*, *, *, *, *, *, *, *, *]")),
        "line 6: here are more than 500000 values",
    ),
    "merged laughs.yaml": (
        lambda path: path.write_text(laughs("{a: 1, b: 2, c: 3}", "{<<: [*, *, *, *, *, *, *, *, *]}")),
        "here are more than 500000 values",
    ),
    "itself.yaml": (lambda path: path.write_text("- &a {job_id: x, note: *a}"), "line 1: *a stands for itself"),
    "bomb.xlsx": (lambda path: sheet(path, " " * 100 * MB), "it has 100"),
    "far.xlsx": (lambda path: sheet(path, '<row r="1000000000"><c r="A1000000000"/></row>'), "too many cells"),
    "wide.xlsx": (
        lambda path: sheet(path, "".join(f'<row r="{n}"><c r="XFD{n}"><v>1</v></c></row>' for n in range(1, 1500))),
        "columns",
    ),
}  # fmt: skip

READ = r"""
import json, re, sys, time
from pathlib import Path
from magi_ray.errors import ManifestError
from magi_ray.manifest import Defaults, read_manifest
from magi_ray.settings import preset
for path in map(Path, sys.argv[1:]):
    begin, message = time.process_time(), "taken"
    try:
        read_manifest(path, Defaults.of(preset("magi-tiny")))
    except ManifestError as exc:
        message = exc.message
    # Not getrusage: that counts the process that started this one, too.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    print(json.dumps([path.name, time.process_time() - begin, peak, message]))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, int, str]]:
    """Of each file: seconds, the most memory so far in bytes, and what was said. One process reads them all."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (make, _) in HOSTILE.items():
        make(folder / name)
    paths = [str(folder / name) for name in HOSTILE]
    ended = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return {name: (seconds, peak, said) for name, seconds, peak, said in map(json.loads, ended.stdout.splitlines())}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_table_is_told_within_seconds_and_below_a_gigabyte(
    name: str, told: dict[str, tuple[float, int, str]]
) -> None:
    seconds, peak, said = told[name]

    assert HOSTILE[name][1] in said
    assert len(said) < 2000
    assert seconds < 10
    assert peak < 10**9
