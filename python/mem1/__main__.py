"""`python -m mem1` is the command `mem1`."""

import sys

from mem1.cli import main

sys.exit(main())
