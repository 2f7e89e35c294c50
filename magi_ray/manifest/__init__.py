"""The manifest: a table with one row per video, in Parquet, CSV, JSON, YAML or Excel. Read, cast, checked, written.

A source (a table, or rows as plain dicts) becomes checked cells and an Arrow table; all problems are reported at once.
A manifest without problems becomes ``Row`` values with the run's defaults filled in.
``manifests/README.md`` explains the columns to people.
"""

from magi_ray.manifest.loading import (
    build_manifest,
    manifest_of,
    manifest_of_bytes,
    manifest_of_table,
    parse_manifest,
    read_manifest,
    require_valid,
    write_manifest,
)
from magi_ray.manifest.messages import explain
from magi_ray.manifest.parquet import COLUMNS
from magi_ray.manifest.rows import Caption, Defaults, Manifest, Row, table_for_show

__all__ = [
    "COLUMNS", "Caption", "Defaults", "Manifest", "Row", "build_manifest", "explain", "manifest_of",
    "manifest_of_bytes", "manifest_of_table", "parse_manifest", "read_manifest", "require_valid", "table_for_show",
    "write_manifest",
]  # fmt: skip
