"""A run's rows sent to Weights & Biases, by a process of its own."""
