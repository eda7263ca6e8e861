"""Alignment: what is trained on the device, in PyTorch. Importing it loads nothing."""
