"""`python -m hyper_merge`: the command line."""

import sys

from hyper_merge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
