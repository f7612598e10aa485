"""Commands on data: prepare it, look at it, say what a run was fed."""
