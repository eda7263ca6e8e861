"""Alignment: what is trained on the device, in PyTorch. Importing it loads nothing."""

OBJECTIVES = ("aligned", "paper")  # how a transcript is placed on the soft tokens, see embedlink.py
