"""What a run will take: time, memory, and the micro-batch that fits."""
