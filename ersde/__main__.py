"""`python -m ersde sample | compare | plot`: pictures of the embedded model, or of a file of its kind."""
import sys

from .demo.command import main

if __name__ == "__main__":
    sys.exit(main())
