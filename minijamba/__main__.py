"""`python -m minijamba` is `minijamba`."""

import sys

from .cli import main

sys.exit(main())
