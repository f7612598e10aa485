"""The one error that a user's mistake ends in."""

from llama_lab.config.schema import Problem


class ConfigError(ValueError):
    """Everything wrong with a request, listed at once.

    Args:
        problems: (what was typed, the rule and a value that works), in the order they should be read.
        scope: what the problems are in, for the heading.
    """

    def __init__(self, problems: list[Problem], scope: str = "this run"):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{count} in {scope}"]
        lines += [f"  {subject} {rule}".rstrip() for subject, rule in problems]
        super().__init__("\n".join(lines))
