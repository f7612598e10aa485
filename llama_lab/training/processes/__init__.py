"""The processes of a run: their places, what they tell each other, and how they are ended."""
