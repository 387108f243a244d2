"""One command for the day a GPU is there: see `__main__.py`."""
