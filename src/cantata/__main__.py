"""`python -m cantata`, and with it `torchrun -m cantata pretrain` where no checkout is at hand."""

import sys

from cantata.cli import main

if __name__ == "__main__":
    sys.exit(main())
