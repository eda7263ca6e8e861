"""Measurements for the documents: `python -m benchmarks.studies.NAME`. Not in the wheel."""
