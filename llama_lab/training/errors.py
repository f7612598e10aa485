"""How a run can fail that is nobody's mistake in typing. Torch-free, so that the command line can name it."""


class RunFailed(RuntimeError):
    """Why a run ended, in words that need no traceback."""


class Diverged(RunFailed):
    """The loss, a gradient or a weight is no longer a finite number."""


class SaveFailed(RunFailed):
    """The last checkpoint of a start could not be written; the one before it stays."""


class OutOfMemory(RunFailed):
    """The device has no room for what the run does at once."""


class RankFailed(RunFailed):
    """One of several processes has failed, and the others were ended."""
