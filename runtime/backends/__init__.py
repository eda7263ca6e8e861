"""Backends: what executes graphs. `base` is their contract; each backend is one file.

May import the bundle; a backend's library is imported inside the functions that need it.
"""
