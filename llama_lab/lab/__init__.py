"""Work on many runs: sweeps, plans. Torch-free; what trains does so in processes of its own."""
