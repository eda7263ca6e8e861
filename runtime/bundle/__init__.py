"""The bundle on disk: manifest, graphs, users, engines, and what they take of memory.

Loads no graph. May import front_ends for the manifest's front end, and nothing else above it.
"""
