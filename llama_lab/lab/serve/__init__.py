"""`llama-lab serve`: runs on a local page, and behind the completions interface that OpenAI's clients speak."""
