"""Alignment: the training on the device, in PyTorch. Importing this package loads nothing."""
