"""Runs beside each other: arms, effects with their intervals, verdicts, the noise floor, and what differs."""
