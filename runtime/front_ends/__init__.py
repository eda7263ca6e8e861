"""Front ends in numpy: audio to the encoder's input, one file per family of encoders.

base.py lists them by kind. Imports nothing but numpy.
"""
