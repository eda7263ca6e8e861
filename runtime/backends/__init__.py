"""Backends: what executes graphs. base.py is their contract, registry.py lists them.

Each backend is one file that ends with its `BACKEND`. The library that it needs is imported
inside the functions that need it. May import the bundle.
"""
