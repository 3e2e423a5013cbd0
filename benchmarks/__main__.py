"""`python -m benchmarks SUITE`."""

import sys

from benchmarks import run

if __name__ == "__main__":
    sys.exit(run.main(sys.argv[1:]))
