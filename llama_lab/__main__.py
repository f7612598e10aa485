"""`python -m llama_lab` is `llama-lab`."""

import sys

from llama_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
