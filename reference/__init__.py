"""The reference bundle: a small stack trained by this project, and the recipe that made it."""
