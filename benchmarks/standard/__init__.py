"""The standard run: what `tiny-align bench` measures, shows and compares. It is in the wheel."""
