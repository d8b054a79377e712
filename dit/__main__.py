"""`python -m dit VERB ...`, for torchrun -m dit and deepspeed --module dit."""

import sys

from dit.cli import main

sys.exit(main(sys.argv[1:]))
