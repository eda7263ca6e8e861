"""Audio files, pipes and arrays to checked float32 mono samples.

Knows no bundle and no model.
"""
