"""Measurements for the documents, run from a checkout: `python -m benchmarks.studies.NAME`. Not in the wheel."""
