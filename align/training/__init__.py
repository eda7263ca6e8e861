"""The trainer: steps, validation, checkpoints.

May import `data`, `model` and the runtime.
"""
