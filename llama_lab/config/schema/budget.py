"""What a run may cost."""

import math
from dataclasses import dataclass

from llama_lab.config.schema.fields import Problem, broken, later, positive


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """What a run may take, or a whole sweep: what is predicted to take more is refused before it starts. Never part of a run's
    identity."""

    gpu_hours: float | None = later(None)
    """Hours of all GPUs together; on a CPU those of the run's processes. Above 0; null: any."""
    gpu_hour_price: float | None = later(None)
    """What one such hour costs, in any currency; `llama-lab plan` then says a price. At least 0; null: unknown."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        hours, price = self.gpu_hours, self.gpu_hour_price
        return broken(
            at,
            self,
            ("gpu_hours", hours is None or positive(hours), "is not above 0; null allows any"),
            ("gpu_hour_price", price is None or 0 <= price < math.inf, "is below 0; null says no price"),
        )
