"""What the data writes and the loss reads in place of a target: layers that do not know each other."""

IGNORE = -100
"""Target of a position that is not predicted: not trained on, and not counted."""
