"""What commands exit with. 3, 7 and 8 belong to errors of their own, see ``magi_ray.errors``."""

from __future__ import annotations

FAILURE = 1
USAGE = 2
FAILED_ROWS = 4
CANCELLED = 5
PAUSED = 6
INTERRUPTED = 130
