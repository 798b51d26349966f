"""`python -m uffdaemon` is the command `uffdaemon`."""

import sys

from uffdaemon.cli import main

sys.exit(main())
