"""The tables that people bring: what each tool writes for each type, and each kind of file, is the same manifest.

`python tests/ground/test_tables.py` writes the table of tools and types into manifests/README.md.
"""

from __future__ import annotations

import datetime
import json
import re
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import fastparquet
import numpy as np
import openpyxl
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from magi_ray.errors import ManifestError
from magi_ray.manifest import (
    Defaults,
    Manifest,
    build_manifest,
    explain,
    manifest_of,
    manifest_of_bytes,
    parse_manifest,
    read_manifest,
)
from magi_ray.settings import preset

README = Path(__file__).parents[2] / "manifests" / "README.md"
DEFAULTS = Defaults.of(preset("magi-tiny"))
ENTRIES = [
    [{"start_chunk": 0, "prompt": "A cat", "kv_range": None}],
    [{"start_chunk": 0, "prompt": "B", "kv_range": [5, 4, 3, 2]}],
]
ENTRY = pa.struct([("start_chunk", pa.uint8()), ("prompt", pa.large_string()), ("kv_range", pa.list_(pa.float32()))])
POLARS_ENTRIES = pl.List(pl.Struct({"start_chunk": pl.Int32, "prompt": pl.String, "kv_range": pl.List(pl.Int8)}))
KEPT = datetime.datetime(2026, 11, 20, 12, 30)

# Each tool writes two rows, a and b, with one more column or without a schedule, into a file.
Column = dict[str, Any]
Write = Callable[[Column, Path], object]


def _names(column: Column) -> Column:
    return {"job_id": ["a", "b"]} | ({} if "schedule" in column else {"prompt": ["A cat", "B"]})


def _pandas(column: Column, path: Path) -> None:
    pd.DataFrame(_names(column) | column).to_parquet(path)


def _fastparquet(column: Column, path: Path) -> None:
    fastparquet.write(str(path), pd.DataFrame(_names(column) | column), object_encoding="infer")


def _polars(column: Column, path: Path) -> None:
    pl.DataFrame(_names(column) | column).write_parquet(path)


def _pyarrow(column: Column, path: Path) -> None:
    pq.write_table(pa.table(_names(column) | column), path)


def _duckdb(column: dict[str, str], path: Path) -> None:
    lists = {name: str(values) for name, values in _names(column).items()} | column
    columns = ", ".join(f"({values})[i] AS {name}" for name, values in lists.items())
    duckdb.sql(f"COPY (SELECT {columns} FROM range(1, 3) t(i)) TO '{path}' (FORMAT parquet)")


TOOLS: dict[str, Write] = {
    "pandas": _pandas, "polars": _polars, "duckdb": _duckdb, "pyarrow": _pyarrow, "fastparquet": _fastparquet,
}  # fmt: skip

# A row of the README: what the type is called; what the rows then say; and the column, as each tool holds it.
# A tool that has no such type has no entry.
ROWS: dict[str, tuple[Column, dict[str, Column]]] = {
    "text": (
        {"image": ["s3://b/a.png", None]},
        {
            "pandas": {"image": pd.array(["s3://b/a.png", None], dtype="str")},
            "polars": {"image": pl.Series(["s3://b/a.png", None])},
            "duckdb": {"image": "['s3://b/a.png', NULL]"},
            "pyarrow": {"image": pa.array(["s3://b/a.png", None], pa.string_view())},
            "fastparquet": {"image": pd.Series(["s3://b/a.png", None], dtype=object)},
        },
    ),
    "long text, bytes": (
        {"image": ["s3://b/a.png", None]},
        {
            "duckdb": {"image": "['s3://b/a.png'::BLOB, NULL]"},
            "polars": {"image": pl.Series([b"s3://b/a.png", None])},
            "pyarrow": {"image": pa.array(["s3://b/a.png", None], pa.large_string())},
            "fastparquet": {"image": pd.Series([b"s3://b/a.png", None], dtype=object)},
        },
    ),
    "category, enum, dictionary": (
        {"fit": ["pad", None]},
        {
            "pandas": {"fit": pd.Categorical(["pad", None], categories=["pad", "crop"])},
            "polars": {"fit": pl.Series(["pad", None], dtype=pl.Categorical)},
            "duckdb": {"fit": "['pad', NULL]::ENUM('pad', 'crop')[]"},
            "pyarrow": {"fit": pa.array(["pad", None]).dictionary_encode()},
            "fastparquet": {"fit": pd.Categorical(["pad", None], categories=["pad", "crop"])},
        },
    ),
    "integers of 8 to 64 bits": (
        {"width": [32, 64]},
        {
            "pandas": {"width": np.array([32, 64], np.int8)},
            "polars": {"width": pl.Series([32, 64], dtype=pl.UInt16)},
            "duckdb": {"width": "[32, 64]::UTINYINT[]"},
            "pyarrow": {"width": pa.array([32, 64], pa.uint64())},
            "fastparquet": {"width": np.array([32, 64], np.uint32)},
        },
    ),
    "integers with nulls": (
        {"seed": [7, None]},
        {
            "pandas": {"seed": pd.array([7, None], dtype="Int64")},
            "polars": {"seed": pl.Series([7, None])},
            "duckdb": {"seed": "[7, NULL]"},
            "pyarrow": {"seed": pa.array([7, None], pa.int16())},
            "fastparquet": {"seed": pd.array([7, None], dtype="Int64")},
        },
    ),
    "whole numbers as floats, NaN": (
        {"num_chunks": [3, None]},
        {
            "pandas": {"num_chunks": [3, np.nan]},
            "polars": {"num_chunks": pl.Series([3.0, float("nan")])},
            "duckdb": {"num_chunks": "[3.0::DOUBLE, 'NaN'::DOUBLE]"},
            "pyarrow": {"num_chunks": pa.array([3.0, float("nan")], pa.float32())},
            "fastparquet": {"num_chunks": [3, np.nan]},
        },
    ),
    "decimals": (
        {"seconds": [2.5, None], "num_steps": [4, None]},
        {
            "pandas": {"seconds": [Decimal("2.50"), None], "num_steps": [Decimal("4.0"), None]},
            "polars": {
                "seconds": pl.Series([Decimal("2.50"), None]),
                "num_steps": pl.Series([Decimal("4.0"), None]),
            },
            "duckdb": {"seconds": "[2.50, NULL]", "num_steps": "[4.0, NULL]"},
            "pyarrow": {"seconds": [Decimal("2.50"), None], "num_steps": [Decimal("4.0"), None]},
        },
    ),
    "true and false": (
        {"include_prefix": [True, None]},
        {
            "pandas": {"include_prefix": pd.array([True, None], dtype="boolean")},
            "polars": {"include_prefix": pl.Series([True, None])},
            "duckdb": {"include_prefix": "[true, NULL]"},
            "pyarrow": {"include_prefix": [True, None]},
            "fastparquet": {"include_prefix": pd.array([True, None], dtype="boolean")},
        },
    ),
    "1.0 and NaN for true and null": (
        {"include_prefix": [True, None]},
        {
            "pandas": {"include_prefix": [1.0, np.nan]},
            "polars": {"include_prefix": pl.Series([1.0, None])},
            "duckdb": {"include_prefix": "[1, NULL]"},
            "pyarrow": {"include_prefix": [1.0, float("nan")]},
            "fastparquet": {"include_prefix": [1.0, np.nan]},
        },
    ),
    "numbers as text": (
        {"seconds": [2.5, None]},
        {
            "pandas": {"seconds": ["2.5", None]},
            "polars": {"seconds": pl.Series(["2.5", ""])},
            "duckdb": {"seconds": "['2.5', NULL]"},
            "pyarrow": {"seconds": ["2.5", ""]},
            "fastparquet": {"seconds": ["2.5", ""]},
        },
    ),
    "`tags` as a map": (
        {"tags": [{"team": "film"}, {"take": "3"}]},
        {
            "duckdb": {"tags": "[MAP {'team': 'film'}, MAP {'take': '3'}]"},
            "pyarrow": {"tags": pa.array([[("team", "film")], [("take", "3")]], pa.map_(pa.string(), pa.string()))},
        },
    ),
    "`tags` as a struct": (
        {"tags": [{"team": "film"}, {"take": "3"}]},
        {
            "pandas": {"tags": [{"team": "film"}, {"take": 3}]},
            "polars": {"tags": pl.Series([{"team": "film", "take": None}, {"team": None, "take": 3}])},
            "duckdb": {"tags": "[{'team': 'film', 'take': NULL}, {'team': NULL, 'take': 3}]"},
            "pyarrow": {"tags": [{"team": "film"}, {"take": 3}]},
        },
    ),
    "`tags` as a list of pairs": (
        {"tags": [{"team": "film"}, {"take": "3"}]},
        {
            "pandas": {"tags": [[["team", "film"]], [["take", "3"]]]},
            "polars": {"tags": pl.Series([[{"key": "team", "value": "film"}], [{"key": "take", "value": "3"}]])},
            "duckdb": {"tags": "[[{'key': 'team', 'value': 'film'}], [{'key': 'take', 'value': '3'}]]"},
            "pyarrow": {"tags": [[{"key": "team", "value": "film"}], [{"key": "take", "value": "3"}]]},
        },
    ),
    "`tags`, `schedule` as JSON text": (
        {"tags": [{"team": "film"}, {"take": "3"}]},
        {
            "pandas": {"tags": ['{"team": "film"}', '{"take": "3"}']},
            "polars": {"tags": pl.Series(['{"team": "film"}', '{"take": "3"}'])},
            "duckdb": {"tags": """['{"team": "film"}', '{"take": "3"}']::JSON[]"""},
            "pyarrow": {"tags": pa.array(['{"team": "film"}', '{"take": "3"}']).cast(pa.json_())},
            "fastparquet": {"tags": pd.Series([{"team": "film"}, {"take": "3"}], dtype=object)},
        },
    ),
    "`schedule` as a list of structs": (
        {"schedule": ENTRIES},
        {
            "pandas": {"schedule": ENTRIES},
            "polars": {"schedule": pl.Series(ENTRIES, dtype=POLARS_ENTRIES)},
            "duckdb": {
                "schedule": "[[{'start_chunk': 0, 'prompt': 'A cat', 'kv_range': NULL::INT[]}],"
                " [{'start_chunk': 0, 'prompt': 'B', 'kv_range': [5, 4, 3, 2]}]]"
            },
            "pyarrow": {"schedule": pa.array(ENTRIES, pa.large_list(ENTRY))},
            "fastparquet": {"schedule": pd.Series(ENTRIES, dtype=object)},
        },
    ),
    "times, as your own column": (
        {"when": [KEPT, None]},
        {
            "pandas": {"when": pd.Series([KEPT, None])},
            "polars": {"when": pl.Series([KEPT, None])},
            "duckdb": {"when": f"[TIMESTAMP '{KEPT}', NULL]"},
            "pyarrow": {"when": pa.array([KEPT, None], pa.timestamp("ns"))},
            "fastparquet": {"when": pd.Series([KEPT, None])},
        },
    ),
    "nested, as your own column": (
        {"shot": [{"lens": [35, 50]}, {"lens": [85]}]},
        {
            "pandas": {"shot": [{"lens": [35, 50]}, {"lens": [85]}]},
            "polars": {"shot": pl.Series([{"lens": [35, 50]}, {"lens": [85]}])},
            "duckdb": {"shot": "[{'lens': [35, 50]}, {'lens': [85]}]"},
            "pyarrow": {"shot": [{"lens": [35, 50]}, {"lens": [85]}]},
        },
    ),
}  # fmt: skip


def wanted(column: Column) -> Manifest:
    """The manifest of plain rows with ``column``."""
    rows: list[dict[str, Any]] = []
    for place, name in enumerate("ab"):
        row = {"job_id": name} | ({} if "schedule" in column else {"prompt": ["A cat", "B"][place]})
        rows.append(row | {key: values[place] for key, values in column.items()})
    return manifest_of(rows, DEFAULTS, base=README.parent)


def outcome(tool: str, row: str, folder: Path) -> str:
    """A cell of the README's table."""
    plain, columns = ROWS[row]
    if tool not in columns:
        return "–"
    TOOLS[tool](columns[tool], folder / "rows.parquet")
    try:
        found = read_manifest(folder / "rows.parquet", DEFAULTS)
    except ManifestError as exc:
        return f"no: {explain(exc.problems)}"
    return "yes" if found.digest == wanted(plain).digest else "no: another digest"


def tools_and_types(folder: Path) -> str:
    lines = [["", *TOOLS], *([row, *(outcome(tool, row, folder) for tool in TOOLS)] for row in ROWS)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLE = re.compile(r"(?<=<!-- tools and types, by tests/ground/test_tables.py -->\n).*?(?=\n[^|])", re.DOTALL)


def test_what_tools_write_is_taken_as_the_readme_says_and_the_same_run_whichever_wrote_it(tmp_path: Path) -> None:
    table = tools_and_types(tmp_path)

    assert "no: " not in table, table
    match = TABLE.search(README.read_text())
    assert match is not None
    assert match[0] == table.rstrip("\n"), "python tests/ground/test_tables.py writes it anew"


# What would lose something


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        ("num_chunks", pa.array([1.0, 2.5]), "2.5 must be a whole number below 2^63; correct the value"),
        ("seed", pa.array([1, 2**63], pa.uint64()), "9223372036854775808 must be a whole number below 2^63"),
        (
            "seed",
            pa.array([1.0, 2.0**53 + 2]),
            "9007199254740994.0 must be a whole number below 2^63 without a rounding",
        ),
        ("seed", pa.array([1.0, 2.0**63]), "9.223372036854776e+18 must be a whole number below 2^63"),
        ("seed", pa.array(["7", "7e400"]), '"7e400" must be a whole number below 2^63'),
        ("include_prefix", pa.array([1.0, 0.7]), "0.7 must be true or false"),
        ("num_steps", pa.array([Decimal("4.0"), Decimal("4.5")]), '"4.5" must be a whole number'),
        ("seconds", pa.array(["1", "1,5"]), '"1,5" must be a number'),
        ("tags", pa.array(["{}", "{team: film}"]), '"{team: film}" must be a map from text to text'),
        ("job_id", pa.array([b"a", b"\xff"]), "must be text"),
    ],
)
def test_what_a_cast_would_lose_is_told_with_row_and_value(
    column: str, cell: pa.Array, words: str, tmp_path: Path
) -> None:
    table = pa.table({"job_id": ["a", "b"], "prompt": ["A cat", "B"]} | {column: cell})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / "rows.parquet", DEFAULTS)

    (line,) = explain(caught.value.problems).split("\n")
    assert line.startswith("row 2")
    assert f"column {column}: " in line
    assert words in line


def test_job_ids_that_are_numbers_are_the_text_of_them(tmp_path: Path) -> None:
    pq.write_table(pa.table({"job_id": [7.0, 8.0], "prompt": ["A cat", "B"]}), tmp_path / "floats.parquet")
    pq.write_table(pa.table({"job_id": [7, 8], "prompt": ["A cat", "B"]}), tmp_path / "integers.parquet")
    floats, integers = (read_manifest(tmp_path / f"{name}.parquet", DEFAULTS) for name in ("floats", "integers"))

    assert [row.job_id for row in floats.rows] == ["7", "8"]
    assert floats.digest == integers.digest


def test_an_index_of_pandas_is_no_column_and_a_named_one_is(tmp_path: Path) -> None:
    frame = pd.DataFrame({"job_id": ["a", "b", "c"], "prompt": ["A", "B", "C"]})
    frame[frame.job_id != "b"].to_parquet(tmp_path / "odd.parquet")  # has __index_level_0__
    frame[frame.job_id != "b"].reset_index(drop=True).to_parquet(tmp_path / "range.parquet")
    frame[frame.job_id != "b"].set_index("job_id").to_parquet(tmp_path / "named.parquet")
    manifests = [read_manifest(tmp_path / f"{name}.parquet", DEFAULTS) for name in ("odd", "range", "named")]

    assert len({manifest.digest for manifest in manifests}) == 1
    kept = pq.read_table(pa.BufferReader(manifests[0].parquet())).to_pandas()  # pandas' own metadata are still there
    assert kept.job_id.to_list() == ["a", "c"]


# Kinds of files

ROWS_OF_ALL: list[dict[str, Any]] = [
    {
        "job_id": "007", "prompt": "Ein Käfer, „still“\nund froh", "seconds": 2.5, "seed": 7, "include_prefix": True,
        "tags": {"team": "no"}, "note": "x",
    },
    {
        "job_id": "day", "num_chunks": 3, "note": "y",
        "schedule": [{"start_chunk": 0, "prompt": "A"}, {"start_chunk": 2, "prompt": "B"}],
    },
]  # fmt: skip
COLUMNS_OF_ALL = ["job_id", "prompt", "seconds", "num_chunks", "seed", "include_prefix", "tags", "schedule", "note"]
CSV = pd.DataFrame(ROWS_OF_ALL, columns=COLUMNS_OF_ALL)


def csv(separator: str = ",", **changes: Any) -> str:
    cells = CSV.assign(**{name: CSV[name].map(json.dumps, na_action="ignore") for name in ("tags", "schedule")})
    return cells.assign(**changes).to_csv(index=False, sep=separator)


def xlsx(path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append([*COLUMNS_OF_ALL, None])
    for row in ROWS_OF_ALL:
        cells = [row.get(name) for name in COLUMNS_OF_ALL]
        book.active.append([json.dumps(cell) if isinstance(cell, dict | list) else cell for cell in cells])
    book.active.append([" "])
    book.active["E2"] = 7.0
    book.active["Z90"].fill = openpyxl.styles.PatternFill("solid", fgColor="FFFF00")  # an empty cell
    book.save(path)


YAML = """
- job_id: 007
  prompt: |-
    Ein Käfer, „still“
    und froh
  seconds: 2.5
  seed: 7
  include_prefix: yes
  tags: &all {team: no}
  note: x
- {job_id: day, num_chunks: 3, note: y, schedule: [{start_chunk: 0, prompt: A}, {start_chunk: 2, prompt: B}]}
"""
FILES: dict[str, Callable[[], str | bytes]] = {
    "comma.csv": csv,
    "semicolon.csv": lambda: "sep=;\r\n" + csv(";", seconds=["2,5", None], include_prefix=["TRUE", None]),
    "bom.csv": lambda: csv(";").encode("utf-8-sig"),
    "floats.csv": lambda: csv(seed=["7.0", ""], num_chunks=["", "3.0"], include_prefix=["1.0", ""]),
    "blank lines.csv": lambda: "\n" + csv() + "\n\n,,,,,,,,\n  \n",
    "pandas' index.csv": lambda: CSV.to_csv(),  # and Python's own way to write lists
    "utf-16.tsv": lambda: csv("\t").encode("utf-16"),
    "utf-16 without a mark.csv": lambda: csv().encode("utf-16-le"),
    "windows.csv": lambda: csv().encode("cp1252"),
    "lines.jsonl": lambda: "\n".join(json.dumps(row) for row in ROWS_OF_ALL) + "\n\n",
    "array.json": lambda: json.dumps(ROWS_OF_ALL, indent=1),
    "lines.json": lambda: "\n".join(json.dumps(row) for row in ROWS_OF_ALL),  # as duckdb writes them
    "columns.json": lambda: CSV.to_json(),
    "rows.yaml": lambda: YAML,
}


def write(name: str, folder: Path) -> Path:
    content = FILES[name]()
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file_is_the_same_manifest(name: str, tmp_path: Path) -> None:
    path = write(name, tmp_path)
    wanted = manifest_of(ROWS_OF_ALL, DEFAULTS, base=tmp_path)
    by_name = read_manifest(path, DEFAULTS)
    by_content = manifest_of_bytes(path.read_bytes(), DEFAULTS, base=tmp_path, name="stdin")

    assert by_name.digest == wanted.digest
    assert by_content.digest == wanted.digest
    notes = {"windows.csv": ("read as Windows-1252",), "pandas' index.csv": ("has no name for column 1,",)}
    found = [note for note in by_name.notes if note not in wanted.notes]
    assert len(found) == len(notes.get(name, ()))
    assert all(words in note for words, note in zip(notes.get(name, ()), found, strict=True))


def test_a_sheet_of_excel_is_the_same_manifest(tmp_path: Path) -> None:
    xlsx(tmp_path / "rows.xlsx")

    assert (
        read_manifest(tmp_path / "rows.xlsx", DEFAULTS).digest
        == manifest_of(ROWS_OF_ALL, DEFAULTS, base=tmp_path).digest
    )


def test_a_sheet_has_mixed_columns_and_other_sheets_which_are_told(tmp_path: Path) -> None:
    with pd.ExcelWriter(tmp_path / "rows.xlsx") as book:
        pd.DataFrame({"job_id": [7, 8], "prompt": ["A", "B"], "note": [3, "x"]}).to_excel(book, sheet_name="shots")
        pd.DataFrame({"a": [1]}).to_excel(book, sheet_name="prices")
    manifest = read_manifest(tmp_path / "rows.xlsx", DEFAULTS)

    assert [(row.job_id, row.extra) for row in manifest.rows] == [("7", {"note": "3"}), ("8", {"note": "x"})]
    assert 'rows.xlsx holds several sheets: "shots" was read, not "prices".' in manifest.notes


def test_of_a_workbook_the_first_sheet_that_shows_is_read_and_formulas_without_a_value_are_told(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    lists, shots = book.worksheets[0], book.create_sheet("shots")
    lists.title, lists.sheet_state = "lists", "hidden"
    lists.append(["calm", "wild"])
    for row in (["job_id", "prompt", "note"], ["a", "A cat", "=1+1"]):
        shots.append(row)
    book.active = 1
    book.save(tmp_path / "rows.xlsx")
    manifest = read_manifest(tmp_path / "rows.xlsx", DEFAULTS)

    assert [(row.job_id, row.extra["note"]) for row in manifest.rows] == [("a", None)]
    assert 'rows.xlsx holds several sheets: "shots" was read, not "lists".' in manifest.notes
    assert any("rows.xlsx has formulas without a value" in note for note in manifest.notes)


def test_a_list_of_json_is_read_whatever_the_file_is_called() -> None:
    rows = json.dumps([{"job_id": "a", "prompt": "A"}], indent=1).encode()
    assert manifest_of_bytes(rows, DEFAULTS, base=README.parent, name="rows.jsonl", kind="jsonl").rows[0].job_id == "a"


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("rows.csv", 'job_id,prompt,width\na,"two\nlines",32\n\nb,B,33\n', "rows.csv:5"),
        ("rows.jsonl", '{"job_id": "a", "prompt": "A"}\n\n{"job_id": "b", "prompt": "B", "width": 33}', "rows.jsonl:3"),
        (
            "rows.json",
            '[{"job_id": "a",\n"prompt": "A"},\n\n{"job_id": "b", "prompt": "B", "width": 33}]',
            "rows.json:4",
        ),
        ("rows.yaml", "- {job_id: a, prompt: A}\n# b\n- {job_id: b, prompt: B, width: 33}", "rows.yaml:3"),
    ],
)
def test_a_bad_row_of_a_text_file_is_named_with_its_line(name: str, content: str, place: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / name, DEFAULTS)

    assert explain(caught.value.problems) == (
        f'row 2 (job "b"), column width: 33 is not a multiple of 16 ({place}); use 32 or 48'
    )


def test_a_bad_cell_of_a_text_file_harms_no_other_row_when_it_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("job_id,prompt,width\na,A,32\nb,B,wide\nc,C,\n")
    loose = read_manifest(tmp_path / "rows.csv", DEFAULTS, strict=False)
    kept = parse_manifest(loose.parquet(), DEFAULTS, base=tmp_path, name="run", stored=True, left_out=loose.problems)

    assert [row.width for row in kept.rows] == [32, DEFAULTS.width]
    assert kept.rows == loose.rows


def test_words_of_yaml_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(
        "- &first {job_id: 2026-11-20, prompt: 12:30:45, tags: {on: off, a: 1_0}}\n- {<<: *first, job_id: no}\n"
    )
    first, second = read_manifest(tmp_path / "rows.yaml", DEFAULTS).rows

    assert (first.job_id, first.captions[0].prompt, first.tags) == ("2026-11-20", "12:30:45", {"on": "off", "a": "1_0"})
    assert (second.job_id, second.tags) == ("no", first.tags)


def test_columns_spelled_otherwise_get_a_hint(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("Job ID,Prompt,num-chunks\na,A,3\n")
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / "rows.csv", DEFAULTS)
    assert explain(caught.value.problems).split("\n") == [
        'column job_id: the column is missing; rename column "Job ID"',
        'column prompt: the column is missing; rename column "Prompt"',
    ]

    (tmp_path / "rows.csv").write_text("job_id,prompt,num-chunks\na,A,3\n")
    assert read_manifest(tmp_path / "rows.csv", DEFAULTS).notes == (
        "Column num-chunks is not one of ours and only travels into the results. Did you mean num_chunks?",
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x1f\x8b" + bytes(50), "is compressed with gzip; unpack it first"),
        (b"ARROW1" + bytes(50), "is an Arrow or Feather file; write it as Parquet"),
        (b"PK\x03\x04" + bytes(50), "is not readable as xlsx: BadZipFile"),
        (b"dear diary", "is of a kind that is not recognised; name it: --format parquet|csv|"),
        (b"", "holds no rows"),
    ],
)
def test_what_is_no_table_is_named(data: bytes, words: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(words)):
        manifest_of_bytes(data, DEFAULTS, base=README.parent, name="stdin")


def test_a_manifest_may_be_built_of_any_kind(tmp_path: Path) -> None:
    count, notes = build_manifest(write("windows.csv", tmp_path), tmp_path / "m.parquet", defaults=DEFAULTS)

    assert (count, len(notes)) == (2, 1)
    assert (
        read_manifest(tmp_path / "m.parquet", DEFAULTS).digest
        == manifest_of(ROWS_OF_ALL, DEFAULTS, base=tmp_path).digest
    )


# Folders


def test_a_folder_of_parts_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.crc").touch()
    pl.DataFrame({"job_id": ["c"], "prompt": ["C"], "seed": [1]}).write_parquet(folder / "part-1.parquet")
    pd.DataFrame({"job_id": pd.Categorical(["a", "b"]), "prompt": ["A", "B"], "seed": [1.0, None]}).to_parquet(
        folder / "part-0.parquet"
    )
    manifest = read_manifest(folder, DEFAULTS)
    rows = [{"job_id": name, "prompt": name.upper(), "seed": seed} for name, seed in (("a", 1), ("b", None), ("c", 1))]

    assert manifest.digest == manifest_of(rows, DEFAULTS, base=folder).digest
    pl.DataFrame({"job_id": ["d"], "prompt": ["D"], "width": [33]}).write_parquet(folder / "part-2.parquet")
    with pytest.raises(ManifestError, match=re.escape("is not a multiple of 16 (part-2.parquet, row 1)")):
        read_manifest(folder, DEFAULTS)
    (folder / "rows.csv").touch()
    with pytest.raises(ManifestError, match="holds tables of several kinds: csv, parquet; name one file"):
        read_manifest(folder, DEFAULTS)


@pytest.mark.parametrize("tool", ["polars", "duckdb", "pandas"])
def test_a_partitioned_table_has_the_columns_that_are_in_its_folders_names(tool: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"job_id": ["a", "b", "c"], "prompt": ["A", "B", "C"], "width": [32, 64, 32]})
    folder = tmp_path / "table"
    if tool == "polars":
        pl.from_pandas(frame).write_parquet(pl.PartitionBy(folder, key="width", include_key=False))
    elif tool == "duckdb":
        duckdb.sql(f"COPY (SELECT * FROM frame) TO '{folder}' (FORMAT parquet, PARTITION_BY width)")
    else:
        frame.to_parquet(folder, partition_cols=["width"])
    rows = read_manifest(folder, DEFAULTS).rows

    assert [(row.job_id, row.width) for row in rows] == [("a", 32), ("c", 32), ("b", 64)]


def test_a_delta_table_is_not_read_as_if_all_its_files_counted(tmp_path: Path) -> None:
    (tmp_path / "_delta_log").mkdir()
    with pytest.raises(ManifestError, match="is a Delta table"):
        read_manifest(tmp_path, DEFAULTS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        README.write_text(TABLE.sub(lambda _: tools_and_types(Path(folder)).rstrip("\n"), README.read_text()))
