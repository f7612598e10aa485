"""Training: one update, the loop around it, and what it leaves on disk.

Beside the loop's own files: `saving` its state, `tracking` it with W&B, the `processes` of a run, `foresight` of what it takes.
"""
