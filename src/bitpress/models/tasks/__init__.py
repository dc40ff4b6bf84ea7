"""Tasks: one file a family of models, one row in `table.py`."""
