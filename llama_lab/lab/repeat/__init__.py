"""Runs made again: from a checkpoint with other values, or to check them."""
