"""Training a projector: a user's, the general one, and the trainer behind both.

May import `evaluation`, `model`, `data` and the runtime.
"""
