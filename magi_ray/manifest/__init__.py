"""The manifest: a Parquet file with one row per video. Read, checked, written, and built from JSONL, CSV or YAML.

A source (Parquet, or rows as plain dicts) becomes checked cells and an Arrow table; all problems are reported at once.
A manifest without problems becomes ``Row`` values with the run's defaults filled in.
``manifests/README.md`` explains the columns to people.
"""

from magi_ray.manifest.loading import (
    build_manifest,
    manifest_of,
    parse_manifest,
    read_manifest,
    require_valid,
    write_manifest,
)
from magi_ray.manifest.messages import explain
from magi_ray.manifest.parquet import COLUMNS
from magi_ray.manifest.rows import Caption, Defaults, Manifest, Row, table_for_show

__all__ = [
    "COLUMNS", "Caption", "Defaults", "Manifest", "Row", "build_manifest", "explain", "manifest_of", "parse_manifest",
    "read_manifest", "require_valid", "table_for_show", "write_manifest",
]  # fmt: skip
