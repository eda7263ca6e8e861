"""Projectors in PyTorch, their objectives, and their files.

May import `data` and the runtime.
"""
