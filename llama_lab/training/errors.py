"""How a run can fail that is nobody's mistake in typing. Torch-free, so that the command line can name it."""


class Diverged(RuntimeError):
    """The loss, a gradient or a weight is no longer a finite number."""
