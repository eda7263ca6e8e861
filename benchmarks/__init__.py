"""The only producer of the README's numbers."""
