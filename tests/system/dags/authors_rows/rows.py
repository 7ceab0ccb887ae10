"""A row function as its author keeps it, in a folder beside the others of that folder."""

import os


def clean(row):
    """Return the row with what the environment says."""
    return {**row, "seen": os.environ["AUTHORS_OWN"]}
