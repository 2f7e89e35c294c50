"""What a manifest may hold, and what is said of one that is wrong."""

from __future__ import annotations

import datetime
import json
import pickle
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from magi_ray.errors import InputError, ManifestError, Problem
from magi_ray.manifest import (
    COLUMNS,
    Caption,
    Defaults,
    Manifest,
    build_manifest,
    explain,
    manifest_of,
    parse_manifest,
    read_manifest,
    table_for_show,
    write_manifest,
)
from magi_ray.settings import ChunkControl, PrefixSettings, override, preset

MANIFESTS = Path(__file__).parents[2] / "manifests"
MARK = {"magi_ray": '{"schema": "magi-ray.manifest", "version": 1}'}
DEFAULTS = Defaults.of(preset("magi-tiny"))
CAT = {"job_id": "cat", "prompt": "A cat"}


def of(*rows: dict[str, Any], base: Path = MANIFESTS) -> Manifest:
    return manifest_of(rows, DEFAULTS, base=base)


def complaints(*rows: dict[str, Any], base: Path = MANIFESTS) -> list[str]:
    """The lines that explain what is wrong with ``rows``."""
    with pytest.raises(ManifestError) as caught:
        of(*rows, base=base)
    return explain(caught.value.problems).split("\n")


def complaint(**cells: Any) -> str:
    """The one line said of a cat's row with ``cells``, from its column on."""
    (line,) = complaints(CAT | cells)
    return line.removeprefix('row 1 (job "cat"), ')


def refused(data: bytes | Path) -> list[str]:
    """The lines that explain what is wrong with the file."""
    with pytest.raises(ManifestError) as caught:
        read_manifest(data, DEFAULTS) if isinstance(data, Path) else parse(data)
    return explain(caught.value.problems).split("\n")


def parse(data: bytes) -> Manifest:
    return parse_manifest(data, DEFAULTS, base=MANIFESTS, name="m.parquet")


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue())


def table(**columns: Any) -> pa.Table:
    """A table of one cat, with ``columns``, and the version that every manifest must bear."""
    return pa.table({"job_id": ["cat"], "prompt": ["A cat"]} | columns).replace_schema_metadata(MARK)


# What ships


def test_the_quickstart_is_valid_and_shows_each_mode() -> None:
    manifest = read_manifest(MANIFESTS / "quickstart.parquet", DEFAULTS)

    assert [row.mode for row in manifest.rows] == ["t2v", "i2v", "v2v"]
    assert [row.num_chunks for row in manifest.rows] == [6, 3, 3]
    assert [caption.start_chunk for caption in manifest.rows[0].captions] == [0, 2, 4]
    assert manifest.rows[1].prefix_location == str(MANIFESTS / "quickstart-image.png")
    assert manifest.notes == ()


MISTAKES = """\
row 1, column job_id: is missing; give every row a name of its own
row 2 (job "two words"), column job_id: "two words" is not 1 to 128 letters, digits, dots, hyphens or underscores; use for example "two-words"
row 3 (job ".."), column job_id: ".." names a folder; use for example "row-3"
row 5 (job "twin"), column job_id: "twin" is the job_id of row 4 too; give every row a name of its own
row 6 (job "no-prompt"), column prompt: is missing, and there is no schedule either; write one of the two
row 7 (job "two-prompts"), column prompt: "A cat" stands beside a schedule, but a row has one or the other; keep prompt for one caption, schedule for several
row 8 (job "blank-prompt"), column prompt: "   " is blank; describe what is to be seen
row 9 (job "empty-schedule"), column schedule: [] is empty; write at least the caption that begins at chunk 0
row 10 (job "late-schedule"), column schedule: start_chunk 2 of entry 1 is not 0; begin the first caption at chunk 0
row 11 (job "unsorted-schedule"), column schedule: start_chunk 1 of entry 3 does not come after start_chunk 2 of the entry before it; sort the entries, one caption per chunk
row 12 (job "long-schedule"), column schedule: start_chunk 3 lies beyond the last chunk of the video, 2; begin at 2 or before, or make the video longer
row 13 (job "blank-in-schedule"), column schedule: prompt null of entry 2 is blank; describe what is to be seen
row 14 (job "null-in-schedule"), column schedule: start_chunk null of entry 2 is not a number; write the chunk at which it begins
row 15 (job "two-prefixes"), column image: "quickstart-image.png" stands beside video "quickstart-clip.mp4", but a row begins from one or the other; leave one of the two empty
row 16 (job "lost-image"), column image: "not-there.png" does not exist; put the file at {folder}/not-there.png, or correct the path
row 17 (job "folder-video"), column video: "." is not a file; write the path of a file
row 18 (job "blank-image"), column image: "" is blank; write where the file lies, or leave the cell null
row 19 (job "web-image"), column image: "ftp://pictures/cat.png" has the scheme ftp, which is not read; use a path, file:// or s3://
row 20 (job "half-bucket"), column video: "s3://bucket" does not name a bucket and a key; write s3://bucket/key
row 21 (job "other-machine"), column image: "file://elsewhere/cat.png" names the machine elsewhere, but only files of this one are read; write file:///absolute/path
row 22 (job "two-lengths"), column seconds: 2.0 stands beside num_chunks 2, but a row has one or the other; leave one of the two empty
row 23 (job "no-length"), column seconds: 0.0 is not a length; write a number above 0, for example 2.5
row 24 (job "no-chunks"), column num_chunks: 0 is below 1; write how many chunks of 24 frames to make
row 25 (job "sunset"), column width: 100 is not a multiple of 16; use 96 or 112
row 26 (job "flat"), column height: 8 is not a multiple of 16; use 16
row 27 (job "too-fast"), column fps: 240 is not between 1 and 120; use a number between them
row 28 (job "negative-seed"), column seed: -1 is not between 0 and 2^63 - 1; use a number between them
row 29 (job "odd-steps"), column num_steps: 10 must be divisible by window_size 4; use 12
row 29 (job "odd-steps"), column num_steps: 10 must be divisible by the 4 values of noise2clean_kvrange; use 12
row 30 (job "no-steps"), column num_steps: 0 is below 1; use the run's 16
row 31 (job "null-tag"), column tags: "team" has no value; give it one, or leave the tag out
row 32 (job "odd-range"), column schedule: kv_range [5, 4, 3] of entry 1 has 3 values, but the 16 steps are not divisible by that; write as many as noise2clean_kvrange has, for example [5, 4, 3, 2]
row 33 (job "blind-range"), column schedule: kv_range [1, 0, 1, 1] of entry 1 has a value below 1, but a chunk always sees itself; use 1 for the chunk alone, 2 for one more, and so on
row 34 (job "no-range"), column schedule: kv_range [] of entry 1 is empty; leave it null, or write how many chunks are seen
row 35 (job "few-scales"), column schedule: text_scales [7.5, 0.0] of entry 1 has 2 values, but cfg_t_range has 5; write one for each of [0.0, 0.0217, 0.1, 0.3, 0.999]
row 36 (job "negative-scale"), column schedule: prev_chunk_scales [1.5, 1.5, 1.5, 1.0, -1.0] of entry 1 has a value that is not a number from 0 on; write numbers, as the run's [1.5, 1.5, 1.5, 1.0, 1.0]
row 37 (job "short-prefix"), column prefix_frames: 3 is shorter than one latent frame, which is 4 frames; use 4 or more, or an image
row 38 (job "middle-prefix"), column prefix_from: "middle" is none of start, end; use start
row 39 (job "stretched"), column fit: "stretch" is none of crop, pad, fit; use crop"""  # noqa: E501


def test_every_mistake_of_a_manifest_is_reported_at_once_with_a_remedy() -> None:
    path = MANIFESTS / "mistakes.parquet"
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, DEFAULTS)

    error = caught.value
    assert explain(error.problems) == MISTAKES.format(folder=MANIFESTS)
    assert error.message.split("\n")[0] == f"{path} cannot be used: 39 problems in 38 of 39 rows."
    assert error.next_command == f"magi-ray manifest validate {path}"
    assert error.exit_code == 3
    assert error.problems[24] == Problem(
        row=26, job_id="flat", column="height", value="8", rule="is not a multiple of 16", remedy="use 16"
    )


@pytest.mark.parametrize("name", ["quickstart", "mistakes"])
def test_the_shipped_parquet_holds_what_its_jsonl_says(name: str, tmp_path: Path) -> None:
    build_manifest(MANIFESTS / f"{name}.jsonl", tmp_path / "built.parquet", defaults=None)

    assert pq.read_table(MANIFESTS / f"{name}.parquet").equals(pq.read_table(tmp_path / "built.parquet"))


# The run's defaults


def test_what_a_row_leaves_out_takes_the_run_s_value() -> None:
    settings = override(
        preset("magi-tiny"),
        {"runtime": {"video_size_w": 96, "video_size_h": 32, "fps": 12, "seed": 7, "num_steps": 8, "num_frames": 100}},
    )
    (row,) = manifest_of([CAT], Defaults.of(settings), base=MANIFESTS).rows

    assert (row.width, row.height, row.fps, row.seed, row.num_steps) == (96, 32, 12, 7, 8)
    assert (row.num_chunks, row.seconds) == (5, None)  # 100 frames are 25 latent frames, of which 6 make a chunk
    assert (row.priority, row.tags, row.extra, row.mode, row.prefix_location) == (0, {}, {}, "t2v", None)
    assert row.captions == (Caption(start_chunk=0, prompt="A cat"),)


def test_a_row_s_own_values_win_over_the_run_s() -> None:
    own = {"width": 32, "height": 48, "fps": 30, "seed": 2**63 - 1, "num_steps": 4, "seconds": 2, "priority": -3}
    (row,) = of(CAT | own | {"tags": {"a": "b"}}).rows

    assert {name: getattr(row, name) for name in own} == own
    assert (row.num_chunks, row.tags) == (None, {"a": "b"})


@pytest.mark.parametrize(
    ("length", "frames"),
    [({"seconds": 2.0, "fps": 24}, 48), ({"seconds": 1.6, "fps": 30}, 48), ({"seconds": 0.3, "fps": 10}, 3),
     ({"seconds": 0.001}, 1), ({"num_chunks": 7}, 168), ({}, 96)],
)  # fmt: skip
def test_a_length_is_a_number_of_frames(length: dict[str, Any], frames: int) -> None:
    assert of(CAT | length).rows[0].frames == frames


def test_rows_survive_pickling() -> None:
    (row,) = of(CAT | {"tags": {"a": "b"}, "note": 1}).rows

    assert pickle.loads(pickle.dumps(row)) == row


# Rules beside those of mistakes.parquet


@pytest.mark.parametrize("seconds", [float("inf"), float("-inf"), -1.0])
def test_a_length_must_be_a_positive_number(seconds: float) -> None:
    assert complaint(seconds=seconds).endswith("is not a length; write a number above 0, for example 2.5")


@pytest.mark.parametrize(
    ("column", "bad", "good"),
    [
        ("fps", [0, 121], [1, 120]),
        ("width", [-16, 0, 15], [16, 1920]),
        ("seed", [-1], [0, 2**63 - 1]),
        ("num_chunks", [-1, 0], [1]),
        ("num_steps", [-4, 0, 6], [4, 64]),
        ("job_id", ["", "a/b", "ä", "a" * 129, ".", ".."], ["a" * 128, "A.b_c-9", "..."]),
    ],
)
def test_ranges_end_where_they_say(column: str, bad: list[Any], good: list[Any]) -> None:
    for value in bad:
        assert all(f"column {column}: " in line for line in complaints(CAT | {column: value}))
    for value in good:
        assert getattr(of(CAT | {column: value}).rows[0], column) == value


MANY = {"schedule": [{"start_chunk": n, "prompt": "A cat"} for n in range(10_001)], "num_chunks": 100_000}


@pytest.mark.parametrize(
    ("cells", "column", "words"),
    [
        ({"num_chunks": 10**9}, "num_chunks", "1000000000 is more than 100,000, the most chunks of a video"),
        ({"seconds": 1e300}, "seconds", "1e+300 is 2.4e+301 frames at 24 fps, but a video has at most 2,400,000; use"),
        ({"seconds": 1e308, "fps": 120}, "seconds", "is inf frames at 120 fps"),
        ({"seconds": 20_001.0, "fps": 120}, "seconds", "is 2.40012e+06 frames at 120 fps"),
        (MANY, "schedule", "has 10,001 entries, but a schedule has at most 10,000"),
        ({"width": 16_000}, "width", "16000 is more than 8,192 pixels"),
        ({"width": 4096, "height": 4096}, "width", "makes 4096×4096, 16,777,216 pixels, but a frame has at most 9,437"),
        ({"prefix_frames": 10**6}, "prefix_frames", "1000000 is more than 10,000, the most frames of a clip"),
        ({"num_steps": 12 * 10**6}, "num_steps", "12000000 is more than 1,000 steps"),
        ({"priority": -(10**9)}, "priority", "-1000000000 is not between -1,000,000 and 1,000,000"),
    ],
)
def test_what_is_too_much_to_be_meant_is_told_before_anything_grows(
    cells: dict[str, Any], column: str, words: str
) -> None:
    row = {"job_id": "cat"} | ({} if "schedule" in cells else {"prompt": "A cat"}) | cells
    begun = time.process_time()  # of this process: the machine may be busy
    (line,) = complaints(row)
    assert time.process_time() - begun < 2
    assert line.startswith(f'row 1 (job "cat"), column {column}: ')
    assert words in line
    # A run that was submitted before there were bounds stays as it is.
    data = pa.Table.from_pylist([row], schema=pa.schema({name: COLUMNS[name] for name in row}))
    stored = parquet(data.replace_schema_metadata(MARK))
    assert len(parse_manifest(stored, DEFAULTS, base=MANIFESTS, name="m", stored=True).rows) == 1


def test_the_most_that_a_row_may_ask_for_is_enough_for_a_day_and_for_4k() -> None:
    assert of(CAT | {"num_chunks": 100_000}).rows[0].num_chunks == 100_000
    assert of(CAT | {"seconds": 86_400.0, "width": 4096, "height": 2304}).rows[0].frames == 24 * 86_400
    long = Defaults.of(override(preset("magi-tiny"), {"runtime": {"num_frames": 10**9}}))
    with pytest.raises(ManifestError, match=r"left to the run's 41,666,667 chunks, but a video has at most 100,000"):
        manifest_of([CAT], long, base=MANIFESTS)


def test_steps_must_fit_this_run_s_window_and_ranges() -> None:
    runtime = {"window_size": 2, "noise2clean_kvrange": [5, 4, 3], "num_steps": 6}
    defaults = Defaults.of(override(preset("magi-tiny"), {"runtime": runtime}))

    assert manifest_of([CAT | {"num_steps": 12}], defaults, base=MANIFESTS).rows[0].num_steps == 12
    with pytest.raises(ManifestError, match="4 must be divisible by the 3 values of noise2clean_kvrange; use 6"):
        manifest_of([CAT | {"num_steps": 4}], defaults, base=MANIFESTS)


def schedule(*starts: int | None) -> list[dict[str, Any]]:
    return [{"start_chunk": start, "prompt": "A cat"} for start in starts]


def test_a_schedule_must_fit_into_the_video_however_its_length_is_given() -> None:
    def lines(starts: list[dict[str, Any]], **length: Any) -> list[str]:
        return complaints({"job_id": "cat", "schedule": starts} | length)

    beyond = "lies beyond the last chunk of the video, {}; begin at {} or before, or make the video longer"
    assert lines(schedule(0, 4))[0].endswith(beyond.format(3, 3))  # the run's 96 frames
    assert lines(schedule(0, 2), seconds=2.0)[0].endswith(beyond.format(1, 1))
    assert lines(schedule(0, 4), seconds=2.0, fps=48)[0].endswith(beyond.format(3, 3))
    assert of({"job_id": "cat", "schedule": schedule(0, 3)}).rows[0].captions[-1].start_chunk == 3


def test_a_schedule_may_reach_the_chunk_that_a_clip_s_frames_can_push_out() -> None:
    # Two seconds are 48 frames. Up to 20 frames of the first chunk can be the clip's, so there may be three chunks.
    clip = str(MANIFESTS / "quickstart-clip.mp4")
    row = {"job_id": "cat", "video": clip, "seconds": 2.0}

    assert of(row | {"schedule": schedule(0, 2)}).rows[0].mode == "v2v"
    assert "last chunk of the video, 2;" in complaints(row | {"schedule": schedule(0, 3)})[0]


def test_one_wrong_value_does_not_hide_another_nor_bring_up_false_ones() -> None:
    row = {"job_id": "c t", "schedule": schedule(0, 9), "fps": 0, "seconds": 1.0, "width": 3}

    assert [line.split("column ")[1].split(":")[0] for line in complaints(row)] == ["job_id", "width", "fps"]


def test_rows_with_problems_can_be_left_out_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    rows = [CAT, {"job_id": "b", "prompt": "B", "fps": 0, "mine": 2}, {"job_id": "c", "prompt": "C", "mine": 3}]
    write_manifest(rows, tmp_path / "m.parquet")
    manifest = read_manifest(tmp_path / "m.parquet", DEFAULTS, strict=False)
    assert [(row.number, row.job_id) for row in manifest.rows] == [(1, "cat"), (3, "c")]
    assert [(row.number, row.fps) for row in manifest.unfit] == [(2, 24)]
    assert [(problem.row, problem.column) for problem in manifest.problems] == [(2, "fps")]
    assert manifest.unknown.to_pylist() == [{"mine": None}, {"mine": 3}]

    # As a run keeps it, which knows what it has left out: here a row that was good but for its picture, too.
    left_out = [*manifest.problems, Problem(row=3, column="image", rule="is damaged", remedy="mend it")]
    again = parse_manifest(manifest.parquet(), DEFAULTS, base=tmp_path, name="m", stored=True, left_out=left_out)
    assert [row.number for row in again.rows] == [1]
    assert again.problems == tuple(left_out)
    with pytest.raises(ManifestError, match="column fps: 0 is not between"):
        parse_manifest(manifest.parquet(), DEFAULTS, base=tmp_path, name="m", stored=True, left_out=left_out[1:])


def test_the_digest_tells_manifests_apart_by_their_bad_rows_too_but_not_by_whether_media_exist(tmp_path: Path) -> None:
    def digest(**cells: Any) -> str:
        return manifest_of([CAT, {"job_id": "b"} | cells], DEFAULTS, base=tmp_path, strict=False).digest

    assert len({digest(), digest(fps=0), digest(fps=-1), digest(prompt="B")}) == 4
    before = digest(prompt="B", image="b.png")
    (tmp_path / "b.png").touch()
    strict = of(CAT, {"job_id": "b", "prompt": "B", "image": "b.png"}, base=tmp_path)
    assert digest(prompt="B", image="b.png") == before == strict.digest


def test_a_table_that_is_wrong_as_a_whole_leaves_no_row(tmp_path: Path) -> None:
    wrong = pa.table({"job_id": ["a"], "prompt": ["A"], "width": ["wide"]}).replace_schema_metadata(MARK)
    (tmp_path / "m.parquet").write_bytes(parquet(wrong))
    manifest = read_manifest(tmp_path / "m.parquet", DEFAULTS, strict=False)
    assert (manifest.rows, len(manifest.problems)) == ((), 1)


# Where media lie


def test_media_paths_start_from_the_manifest_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a picture.png").touch()
    write_manifest([CAT | {"image": "a picture.png"}], tmp_path / "in" / "m.parquet")
    monkeypatch.chdir(tmp_path)

    (row,) = read_manifest(Path("in/m.parquet"), DEFAULTS).rows

    assert row.image == "a picture.png"
    assert row.prefix_location == str(tmp_path / "in" / "a picture.png")


@pytest.mark.parametrize(
    "form", ["{}/a%20picture.png", "file://{}/a%20picture.png", "FILE://localhost{}/a%20picture.png"]
)
def test_only_file_uris_are_unquoted(form: str, tmp_path: Path) -> None:
    (tmp_path / "a picture.png").touch()
    written = form.format(tmp_path)

    if written.lower().startswith("file"):
        assert of(CAT | {"image": written}).rows[0].prefix_location == str(tmp_path / "a picture.png")
    else:
        assert "does not exist" in complaint(image=written)


@pytest.mark.parametrize(("written", "reason"), [("x" * 300, "File name too long"), ("a\0b", "embedded null byte")])
def test_a_path_that_no_file_can_have_is_one_row_s_problem(written: str, reason: str) -> None:
    assert complaint(image=written).endswith(f"cannot be read ({reason}); correct the path")


@pytest.mark.parametrize(
    ("cell", "remedy"),
    [
        ({"image": "~/cat.png"}, "write the whole path: ~ is not read as a home folder"),
        ({"image": "NA"}, "leave the cell empty where it says nothing"),
        ({"seed": "#N/A"}, "leave the cell empty where it says nothing"),
        ({"image": " cat.png"}, 'write "cat.png", without blanks around it'),
        ({"tags": "{a=b}"}, 'write it as {"team": "film"}'),
        ({"prompt": None, "schedule": "0: sea"}, 'write it as [{"start_chunk": 0, "prompt": "A cat"}]'),
        (
            {"prompt": None, "schedule": [{"start_chunk": 0, "promt": "sea"}]},
            "leave promt out of entry 1, or correct its name",
        ),
    ],
)
def test_a_cell_as_other_programs_write_it_gets_the_remedy_for_it(
    cell: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    (tmp_path / "cat.png").touch()
    with pytest.raises(ManifestError) as caught:
        of(CAT | cell, base=tmp_path)
    assert remedy in [problem.remedy for problem in caught.value.problems]


def test_an_s3_uri_is_taken_for_its_form() -> None:
    manifest = of(CAT | {"image": "s3://bucket/folder/cat.png"})

    assert manifest.rows[0].prefix_location == "s3://bucket/folder/cat.png"


def test_a_resumed_run_reads_its_rows_although_a_picture_has_gone(tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    picture.touch()
    kept = of(CAT | {"image": "cat.png"}, base=tmp_path)
    picture.unlink()

    again = parse_manifest(kept.parquet(), DEFAULTS, base=tmp_path, name="run", stored=True)

    assert again.rows == kept.rows
    assert again.digest == kept.digest


# The file


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    assert refused(tmp_path / "m.parquet") == [f"{tmp_path}/m.parquet does not exist; give the path of a table"]


@pytest.mark.parametrize("data", [b"", b"job_id,prompt\n"])
def test_another_kind_of_file_is_named_as_such(data: bytes) -> None:
    (line,) = refused(data)

    assert line == "m.parquet is not a Parquet file; name its kind: --format csv, for example"


def test_a_file_cut_anywhere_is_refused() -> None:
    data = of(CAT).parquet()

    for length in range(4, len(data), 97):
        (line,) = refused(data[:length])
        assert line == "m.parquet is cut off: its end is missing; copy or build it again"


def test_a_flipped_byte_in_a_page_is_found() -> None:
    # Without checksums Arrow reads this file without a word and renders another prompt.
    data = bytearray(of(CAT | {"prompt": "A cat on a sofa, of which no word repeats"}).parquet())
    place = data.index(b"sofa")
    data[place] ^= 1

    assert refused(bytes(data)) == ["m.parquet is damaged: a page does not match its checksum; copy or build it again"]


def test_a_damaged_footer_is_refused() -> None:
    data = of(CAT).parquet()

    (line,) = refused(data[:-60] + bytes(52) + data[-8:])

    assert line.startswith("m.parquet is damaged: ")


@pytest.mark.parametrize("metadata", [None, {"magi_ray": "version one"}, {"magi_ray": "[]"}])
def test_a_file_without_a_schema_version_has_the_current_one(metadata: dict[str, str] | None) -> None:
    plain = parse(parquet(table(width=[32]).replace_schema_metadata(metadata)))

    assert plain.digest == parse(parquet(table(width=[32]))).digest
    assert json.loads(pq.read_schema(pa.BufferReader(plain.parquet())).metadata[b"magi_ray"])["version"] == 1


def test_a_newer_schema_is_not_guessed_at() -> None:
    newer = table(width=[3]).replace_schema_metadata(
        {"magi_ray": json.dumps({"schema": "magi-ray.manifest", "version": 2})}
    )

    assert refused(parquet(newer)) == [
        "m.parquet has version 2, but this magi-ray reads up to 1; install a newer magi-ray"
    ]


def test_a_manifest_without_rows_is_refused() -> None:
    assert refused(parquet(table().slice(0, 0))) == ["the manifest holds no rows; write one row for each video"]


def test_a_manifest_without_names_is_refused_once_and_not_for_each_row() -> None:
    assert refused(parquet(table().drop_columns(["job_id"]))) == [
        "column job_id: the column is missing; give every row a name of its own"
    ]


@pytest.mark.parametrize(
    ("column", "found", "types"),
    [
        ("width", [[64]], "type list<element: int64> cannot be cast to int64"),
        ("seconds", [datetime.date(2026, 11, 20)], "type date32[day] cannot be cast to double"),
        ("prompt", [{"en": "A cat"}], "type struct<en: string> cannot be cast to string"),
        ("tags", [1], "type int64 cannot be cast to map<string, string>"),
        ("schedule", [{"start_chunk": 0}], "type struct<start_chunk: int64> cannot be cast to list<item: struct<"),
    ],
)
def test_a_column_of_the_wrong_type_is_named_with_both_types(column: str, found: Any, types: str) -> None:
    (line,) = refused(parquet(table(**{column: found})))

    assert line.startswith(f"column {column}: {types}")
    assert line.endswith(", the type of this column; cast the column")


def test_a_column_of_pictures_themselves_is_told_to_hold_paths() -> None:
    (line,) = refused(parquet(table(image=[{"bytes": b"png", "path": "cat.png"}])))

    assert line.endswith("; write each as a file, and its path here")


def test_rows_are_checked_beside_a_column_of_the_wrong_type() -> None:
    first, second = refused(parquet(table(prompt=[[1]], height=[7])))

    assert "column prompt: type list<element: int64>" in first
    assert second.endswith("column height: 7 is not a multiple of 16; use 16")


def test_a_column_that_is_there_twice_is_refused() -> None:
    twice = pa.table([["cat"], ["A cat"], ["x"], ["y"]], names=["job_id", "prompt", "note", "note"])

    assert refused(parquet(twice.replace_schema_metadata(MARK))) == [
        "column note: the column is there twice; keep one of them"
    ]


def test_a_tag_that_is_there_twice_is_refused() -> None:
    tags = pa.array([[("team", "film"), ("team", "sound")]], pa.map_(pa.string(), pa.string()))

    (line,) = refused(parquet(table(tags=tags)))

    assert line.endswith('column tags: "team" is there twice; keep one of them')


def test_the_widths_that_other_tools_give_their_types_do_not_matter() -> None:
    entry = pa.struct([("prompt", pa.large_string()), ("start_chunk", pa.int8())])
    columns = {
        "job_id": pa.array(["cat"]).dictionary_encode(),
        "schedule": pa.array([schedule(0, 1)], pa.large_list(entry)),
        "width": pa.array([32], pa.uint16()),
        "seconds": pa.array([2], pa.int32()),
        "image": pa.nulls(1),
    }
    (row,) = parse(parquet(pa.table(columns).replace_schema_metadata(MARK))).rows

    assert (row.job_id, row.width, row.seconds, row.captions[1].start_chunk) == ("cat", 32, 2.0, 1)


# What an entry of a schedule may bring


def controlled(**control: Any) -> dict[str, Any]:
    return {"job_id": "cat", "schedule": [schedule(0)[0], {"start_chunk": 2, "prompt": "A cat"} | control]}


def test_an_entry_brings_its_own_ranges_and_scales_and_others_keep_the_run_s() -> None:
    scales = [5, 5, 5, 1, 0]
    (row,) = of(controlled(kv_range=[1, 4, 3, 2], text_scales=scales)).rows

    assert row.captions[0].control == ChunkControl()
    assert row.captions[1].control == ChunkControl(kv_range=(1, 4, 3, 2), text_scales=(5.0, 5.0, 5.0, 1.0, 0.0))
    assert table_for_show(of(controlled(kv_range=[1])))[0]["controls"] == {"2": {"kv_range": [1]}}


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"kv_range": []}, "kv_range [] of entry 2 is empty"),
        ({"kv_range": [5, 4, 3]}, "of entry 2 has 3 values, but the 16 steps are not divisible by that"),
        ({"kv_range": [5, 4, 3, 0]}, "kv_range [5, 4, 3, 0] of entry 2 has a value below 1"),
        ({"kv_range": [5, None]}, "kv_range [5, null] of entry 2 has a value below 1"),
        ({"text_scales": [7.5]}, "text_scales [7.5] of entry 2 has 1 values, but cfg_t_range has 5"),
        ({"prev_chunk_scales": [1, 1, 1, 1, -1]}, "of entry 2 has a value that is not a number from 0 on"),
        ({"text_scales": [1, 1, 1, 1, float("nan")]}, "of entry 2 has a value that is not a number from 0 on"),
        ({"text_scales": [1, 1, 1, 1, None]}, "of entry 2 has a value that is not a number from 0 on"),
        ({"kv_range": 1}, "must be a list of {start_chunk, prompt}, each with or without kv_range"),
        ({"kv_range": [1.5]}, "must be a list of {start_chunk, prompt}, each with or without kv_range"),
    ],
)  # fmt: skip
def test_ranges_and_scales_that_cannot_be_are_named(control: dict[str, Any], words: str) -> None:
    (line,) = complaints(controlled(**control))

    assert words in line


def test_a_model_without_guidance_takes_no_scales() -> None:
    distilled = override(preset("magi-tiny"), {"runtime": {"cfg_number": 1}, "engine": {"distill": True}})

    with pytest.raises(ManifestError, match=r"asks for guidance, but this model has none \(cfg_number 1\)"):
        manifest_of([controlled(text_scales=[1] * 5)], Defaults.of(distilled), base=MANIFESTS)
    assert manifest_of([controlled(kv_range=[1])], Defaults.of(distilled), base=MANIFESTS).rows


def test_a_schedule_without_the_newer_fields_is_as_valid_as_ever_and_the_same_manifest() -> None:
    entry = pa.struct([("start_chunk", pa.int64()), ("prompt", pa.string())])
    old = pa.table({"job_id": ["cat"], "schedule": pa.array([schedule(0, 2)], pa.list_(entry))})
    found = parse(parquet(old.replace_schema_metadata(MARK)))

    assert found.digest == of({"job_id": "cat", "schedule": schedule(0, 2)}).digest
    # As it was before entries could bring more.
    assert found.digest == "10bdc7a5d84400fc8eba11d087d3fce7f52ad75958a797d8e50acb9793b52a65"
    assert found.digest != of(controlled(kv_range=[1])).digest != of(controlled(kv_range=[2])).digest


def test_a_field_of_a_schedule_that_is_none_of_ours_is_refused_where_it_says_something() -> None:
    entry = pa.struct([("start_chunk", pa.int64()), ("prompt", pa.string()), ("note", pa.string())])
    column = pa.array(
        [[{"start_chunk": 0, "prompt": "A cat"}], [{"start_chunk": 0, "prompt": "B", "note": "x"}]], pa.list_(entry)
    )
    (line,) = refused(parquet(pa.table({"job_id": ["a", "b"], "schedule": column})))

    assert line.startswith(
        'row 2 (job "b"), column schedule: [{"start_chunk": 0, "prompt": "B", "note": "x"}] must be a'
    )


def test_the_transitions_explained_are_valid(folder: Path) -> None:
    (block,) = [b for b in (MANIFESTS / "README.md").read_text().split("```json\n") if '"new-shot"' in b]
    shot, look = build(folder, "rows.jsonl", block.split("```")[0]).rows

    assert [caption.control.kv_range for caption in shot.captions] == [None, (1, 1, 3, 2), None]
    assert [caption.control.kv_range for caption in look.captions] == [None, (5, 4, 1, 1), None]


# Prefixes


def test_what_a_row_says_of_its_prefix_wins_over_the_run() -> None:
    run = Defaults.of(override(preset("magi-tiny"), {"prefix": {"take": "end", "max_frames": 48, "include": True}}))
    own = {"prefix_from": "start", "prefix_frames": 4, "fit": "pad", "include_prefix": False}
    clip = CAT | {"video": "quickstart-clip.mp4"}
    of_run, of_row = manifest_of([clip, clip | own | {"job_id": "b"}], run, base=MANIFESTS).rows

    assert of_run.prefix == PrefixSettings(take="end", max_frames=48, include=True)
    assert of_row.prefix == PrefixSettings(take="start", max_frames=4, fit="pad", include=False)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("prefix_frames", 3, "3 is shorter than one latent frame, which is 4 frames; use 4 or more, or an image"),
        ("prefix_frames", -32, "-32 is shorter than one latent frame"),
        ("prefix_from", "End", '"End" is none of start, end; use end'),
        ("fit", "stretch", '"stretch" is none of crop, pad, fit; use crop'),
        ("include_prefix", 0.7, "0.7 must be true or false"),
        ("include_prefix", "perhaps", '"perhaps" must be true or false'),
    ],
)
def test_a_prefix_that_cannot_be_is_named(column: str, value: Any, words: str) -> None:
    assert complaint(video="quickstart-clip.mp4", **{column: value}).startswith(f"column {column}: {words}")


def test_a_prefix_column_that_counts_for_nothing_is_noted() -> None:
    image = CAT | {"image": "quickstart-image.png", "fit": "pad"}

    assert of(image).notes == ()
    assert of(image | {"prefix_frames": 8}, CAT | {"job_id": "b", "prefix_frames": 8, "fit": "pad"}).notes == (
        "Row 1 (2 rows) says prefix_frames, which counts only where a video begins from a clip.",
        "Row 2 says fit, which counts only where a video begins from an image or a clip.",
    )


# What unknown columns bring


def test_unknown_columns_travel_with_their_types_through_a_kept_manifest() -> None:
    when = datetime.datetime(2026, 11, 20, 12, 30)
    extra = {"shot": pa.array([7], pa.int16()), "when": pa.array([when]), "vector": pa.array([[1.5, None]])}
    manifest = parse(parquet(table(**extra)))

    again = parse(manifest.parquet())

    assert again.rows[0].extra == {"shot": 7, "when": when, "vector": [1.5, None]}
    assert again.unknown.schema.types == [column.type for column in extra.values()]
    assert again.digest == manifest.digest
    json.dumps(table_for_show(again))


def test_nanoseconds_of_an_unknown_column_do_not_stop_a_run() -> None:
    exact = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns"))

    manifest = parse(parquet(table(exact=exact)))

    assert manifest.rows[0].extra == {"exact": "2023-11-14 22:13:20.123456789"}
    assert manifest.unknown.column("exact").type == pa.timestamp("ns")


def test_metadata_of_others_stays_in_a_kept_manifest() -> None:
    theirs = table().replace_schema_metadata(MARK | {"huggingface": "theirs"})
    kept = parse(parquet(theirs)).parquet()

    assert pq.read_schema(pa.BufferReader(kept)).metadata[b"huggingface"] == b"theirs"


def test_a_column_with_nearly_one_of_our_names_is_noted() -> None:
    assert of(CAT | {"widht": 64, "num_frames": 48, "author": "me"}).notes == (
        "Column widht is not one of ours and only travels into the results. Did you mean width?",
        "Column num_frames is not one of ours and only travels into the results. Did you mean num_chunks or seconds?",
    )


# The digest


def test_the_digest_is_of_what_the_rows_say_and_not_of_how_the_file_says_it() -> None:
    def digest(data: pa.Table, **options: Any) -> str:
        return parse(parquet(data, **options)).digest

    one = digest(table(seconds=[2.0], note=["x"]))

    assert digest(table(seconds=[2.0], note=["x"]), compression="zstd") == one
    assert digest(table(note=["x"], seconds=pa.array([2], pa.int8()), width=pa.nulls(1)), use_dictionary=False) == one
    assert of({"job_id": "cat", "schedule": schedule(0), "seconds": 2.0, "note": "x", "tags": {}}).digest == one


def test_the_digest_does_not_know_the_run_s_defaults_nor_this_machine_s_folders(tmp_path: Path) -> None:
    other = Defaults.of(override(preset("magi-tiny"), {"runtime": {"seed": 5, "num_frames": 24}}))
    row = CAT | {"image": "quickstart-image.png"}
    (tmp_path / "quickstart-image.png").touch()

    assert manifest_of([row], other, base=tmp_path).digest == of(row).digest
    (tmp_path / "renamed.png").touch()
    assert manifest_of([row | {"image": "renamed.png"}], other, base=tmp_path).digest == of(row).digest


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": "dog"}, {"prompt": "A dog"}, {"seed": 0}, {"seconds": 2.0}, {"num_chunks": 4}, {"priority": 1},
        {"tags": {"a": "b"}}, {"note": "x"}, {"image": "quickstart-image.png"}, {"fps": 24},
    ],
)  # fmt: skip
def test_the_digest_changes_with_anything_a_row_says(change: dict[str, Any]) -> None:
    assert of(CAT | change).digest != of(CAT).digest


# Building from text

FULL: list[dict[str, Any]] = [
    {
        "job_id": "cat", "prompt": "Eine Katze, „still“\u2028und froh", "image": "quickstart-image.png", "seconds": 2.5,
        "width": 32, "height": 48, "fps": 30, "seed": 2**63 - 1, "num_steps": 8, "priority": 2,
        "fit": "pad", "tags": {"team": "film", "ä": ""},
        "note": "x, \"y\"", "score": 0.5, "nested": {"list": [1, 2]}, "flag": True,
    },
    {
        "job_id": "day", "num_chunks": 3, "video": "quickstart-clip.mp4", "prefix_from": "end", "prefix_frames": 16,
        "include_prefix": True, "note": None,
        "schedule": [schedule(0)[0], {"start_chunk": 2, "prompt": "A cat", "kv_range": [1, 4, 3, 2]}],
    },
]  # fmt: skip


def check_full(manifest: Manifest) -> None:
    cat, day = manifest.rows
    for name in ("job_id", "image", "seconds", "width", "height", "fps", "seed", "num_steps", "priority", "tags"):
        assert getattr(cat, name) == FULL[0][name]
    assert cat.captions[0].prompt == FULL[0]["prompt"]
    assert [caption.start_chunk for caption in day.captions] == [0, 2]
    assert day.captions[1].control == ChunkControl(kv_range=(1, 4, 3, 2))
    assert (day.num_chunks, day.video, day.image, day.tags) == (3, "quickstart-clip.mp4", None, {})
    assert (cat.prefix.fit, day.prefix) == ("pad", PrefixSettings(take="end", max_frames=16, include=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the media that the rows name."""
    for name in ("quickstart-image.png", "quickstart-clip.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def build(folder: Path, name: str, content: str | bytes) -> Manifest:
    source = folder / name
    source.write_bytes(content.encode() if isinstance(content, str) else content)
    build_manifest(source, folder / "m.parquet", defaults=DEFAULTS)
    return read_manifest(folder / "m.parquet", DEFAULTS)


def build_complaints(folder: Path, name: str, content: str | bytes) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        build(folder, name, content)
    assert not (folder / "m.parquet").exists()
    return explain(caught.value.problems).split("\n")


def test_json_lines_become_parquet_with_every_column_as_it_was(folder: Path) -> None:
    manifest = build(folder, "rows.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in FULL))

    check_full(manifest)
    assert manifest.rows[0].extra == {key: FULL[0][key] for key in ("note", "score", "nested", "flag")}
    assert manifest.rows[1].extra == {"note": None, "score": None, "nested": None, "flag": None}
    assert manifest.digest == of(*FULL, base=folder).digest


def test_yaml_becomes_the_same_manifest_as_json_lines(folder: Path) -> None:
    # JSON is YAML too.
    manifest = build(folder, "rows.yaml", "".join(f"- {json.dumps(row)}\n" for row in FULL))

    assert manifest.digest == build(folder, "rows.jsonl", "\n".join(json.dumps(row) for row in FULL)).digest


def test_csv_cells_get_the_types_of_their_columns(folder: Path) -> None:
    known = [{key: value for key, value in row.items() if key not in ("score", "nested", "flag")} for row in FULL]
    header = [*known[0], *(key for key in known[1] if key not in known[0])]

    def cell(value: Any) -> str:
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
        return '"' + text.replace('"', '""') + '"'

    lines = [",".join(header)] + [",".join(cell(row.get(name)) for name in header) for row in known]
    manifest = build(folder, "rows.csv", "\ufeff" + "\r\n".join(lines))

    check_full(manifest)
    assert manifest.digest == of(*known, base=folder).digest


def test_wrong_types_in_text_are_all_reported_with_their_lines(folder: Path) -> None:
    content = '{"job_id": [7], "prompt": "A cat"}\n\n{"job_id": "b", "prompt": "A cat", "width": "6x", "fps": 999}\n'

    assert build_complaints(folder, "rows.jsonl", content) == [
        "row 1, column job_id: [7] must be text (rows.jsonl:1); correct the value",
        'row 2 (job "b"), column width: "6x" must be a whole number below 2^63 (rows.jsonl:3); correct the value',
        'row 2 (job "b"), column fps: 999 is not between 1 and 120 (rows.jsonl:3); use a number between them',
    ]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("width", True, "true must be a whole number below 2^63"),
        ("seed", 2**63, "9223372036854775808 must be a whole number below 2^63"),
        ("seconds", "2 s", '"2 s" must be a number'),
        ("tags", {"take": [3]}, "must be a map from text to text"),
        ("schedule", "A cat", '"A cat" must be a list of {start_chunk, prompt}'),
        ("schedule", [{"chunk": 0}], '[{"chunk": 0}] must be a list of {start_chunk, prompt}'),
        ("note", "\ud800", "is not valid Unicode"),
    ],
)
def test_each_column_takes_its_own_kind_of_value(column: str, value: Any, words: str) -> None:
    assert words in complaint(**{column: value})


def test_a_csv_cell_that_is_no_number_is_named_with_its_line(folder: Path) -> None:
    content = 'job_id,prompt,width,schedule\na,"two\nlines",64,\nb,A cat,wide,\nc,,,[0]\n'

    assert build_complaints(folder, "rows.csv", content) == [
        'row 2 (job "b"), column width: "wide" must be a whole number below 2^63 (rows.csv:4); correct the value',
        'row 3 (job "c"), column schedule: [0] must be a list of {start_chunk, prompt}, each with or without '
        'kv_range, text_scales, prev_chunk_scales (rows.csv:5); write it as [{"start_chunk": 0, "prompt": "A cat"}]',
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", '{"job_id": "a"}\n{"job_id"', "is not readable as jsonl: line 2: "),
        ("rows.jsonl", '{"job_id": "a", "job_id": "b"}', "line 1: job_id is there twice"),
        ("rows.jsonl", "[1]", "line 1: a row must be a map from column to value, but is 1;"),
        ("rows.jsonl", b"\xff", "is not readable as jsonl: "),
        (
            "rows.jsonl",
            "```json\n",
            'line 1: Expecting value: line 1 column 1 (char 0), in "```json"; a line is a whole row',
        ),
        ("rows.json", "[]", "holds no rows"),
        ("rows.json", '{"videos": [{"job_id": "a"}]}', 'the rows are inside "videos"; that list must stand alone'),
        ("rows.yaml", "rows:\n- job_id: a", 'the list inside "rows" must stand alone'),
        ("rows.csv", "job_id,prompt\na,b,c\n", 'line 2: 3 cells, but the header has 2, "job_id, prompt"; a cell that'),
        ("rows.tsv", "# mine, 2026\njob_id\tprompt\n", 'line 2: 1 cells, but the header has 2, "# mine, 2026"'),
        ("rows.csv", 'job_id,prompt\na,"b\n', "line 2: a quote is never closed"),
        ("rows.csv", "job_id,job_id\na,b\n", "line 1: column job_id is there twice"),
        ("rows.yaml", "job_id: a", "the file must be a list of rows, each beginning with '- '"),
        ("rows.yaml", "- a: [", "is not readable as yaml: "),
        ("rows.yaml", "- job_id: a\n- 3", "line 2: a row must be a map from column to value, but is 3"),
        ("rows.txt", "cat sofa", "is of a kind that is not recognised; name it: --format parquet|csv|"),
        ("rows.yaml", "", "holds no rows"),
        ("rows.csv", "", "holds no rows"),
        ("rows.jsonl", "", "holds no rows"),
    ],
)
def test_text_that_is_no_table_is_refused_with_its_place(
    folder: Path, name: str, content: str | bytes, words: str
) -> None:
    (line,) = build_complaints(folder, name, content)

    assert words in line


def test_values_of_several_types_in_an_unknown_column_are_refused() -> None:
    (line,) = complaints(CAT | {"note": "x"}, {"job_id": "b", "prompt": "B", "note": 3})

    assert line.startswith("column note: the values do not make a Parquet column: ")


def test_a_build_overwrites_nothing_but_a_manifest(folder: Path) -> None:
    source = folder / "rows.jsonl"
    source.write_text(json.dumps(CAT))

    with pytest.raises(InputError, match=r"does not end in \.parquet"):
        build_manifest(source, source, defaults=DEFAULTS)
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        build_manifest(source, folder / "none" / "m.parquet", defaults=DEFAULTS)
    assert json.loads(source.read_text()) == CAT


# For people


def test_a_hopeless_manifest_is_explained_on_one_screen() -> None:
    lines = complaints(*({"job_id": f"cat-{n}", "prompt": "A cat", "width": n * 16 + 1, "fps": 0} for n in range(500)))

    assert len(lines) == 40
    assert lines[38] == 'row 20 (job "cat-19"), column width: 305 is not a multiple of 16; use 304 or 320'
    assert lines[39] == "and 961 more in 481 rows: fps 481, width 480"


def test_long_values_are_shortened() -> None:
    line = complaint(image="x" * 200)

    assert line.startswith('column image: "' + "x" * 55 + ' …" does not exist; put the file at ')


def test_a_row_is_shown_as_plain_data() -> None:
    (shown,) = table_for_show(of(CAT | {"seconds": 2.5, "tags": {"a": "b"}, "note": "x"}))

    assert shown == {
        "row": 1, "job_id": "cat", "mode": "t2v", "captions": {"0": "A cat"}, "controls": {}, "from": None,
        "length": "2.5 s", "seconds": 2.5, "num_chunks": None, "size": "64×64", "width": 64, "height": 64, "fps": 24,
        "seed": 1234, "num_steps": 16, "priority": 0, "tags": {"a": "b"}, "extra": {"note": "x"},
    }  # fmt: skip


def test_the_columns_explained_are_the_columns_there_are() -> None:
    from magi_ray.manifest import COLUMNS

    explained = (MANIFESTS / "README.md").read_text()

    assert [name for name in COLUMNS if f"| `{name}`" not in explained and f"`{name}` |" not in explained] == []


def test_every_column_has_a_type_and_rules() -> None:
    from magi_ray.manifest import COLUMNS
    from magi_ray.manifest.parquet import CONTROLS
    from magi_ray.manifest.rules import Cells, Entry

    assert set(Cells.model_fields) == set(COLUMNS)
    assert set(Entry.model_fields) == {"start_chunk", "prompt", *CONTROLS}
    assert [field.name for field in COLUMNS["schedule"].value_type] == list(Entry.model_fields)


def test_a_hundred_thousand_rows_are_checked_in_seconds() -> None:
    rows = [CAT | {"job_id": f"cat-{n}", "seed": n, "tags": {"n": str(n)}, "note": n} for n in range(100_000)]
    data = of(*rows).parquet()

    begin = time.process_time()  # of this process: the machine may be busy
    manifest = parse(data)

    assert len(manifest.rows) == 100_000
    assert time.process_time() - begin < 10
