"""Batch rendering of long AI videos with MAGI-1 on Ray."""

__version__ = "0.1.0"
