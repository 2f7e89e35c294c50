"""The manifest: a Parquet file with one row per video. Read, checked, written, and built from JSONL, CSV or YAML.

A source (Parquet, or rows as plain dicts) becomes cells that the rules were asked of, and an Arrow table; all that is
wrong is told at once. What is left becomes ``Row`` values in which the run's defaults are filled in.
``manifests/README.md`` explains the columns to people.
"""

from magi_ray.manifest.loading import build_manifest, manifest_of, parse_manifest, read_manifest, write_manifest
from magi_ray.manifest.messages import explain
from magi_ray.manifest.parquet import COLUMNS
from magi_ray.manifest.rows import Caption, Defaults, Manifest, Row, table_for_show

__all__ = [
    "COLUMNS",
    "Caption",
    "Defaults",
    "Manifest",
    "Row",
    "build_manifest",
    "explain",
    "manifest_of",
    "parse_manifest",
    "read_manifest",
    "table_for_show",
    "write_manifest",
]
