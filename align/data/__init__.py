"""Data sets, features on disk, augmentation and rehearsal data: what a projector is trained on.

May import the runtime; knows no projector.
"""
