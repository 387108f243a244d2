"""Checks and measurements of everything on a GPU, in one command: see `__main__.py`."""
