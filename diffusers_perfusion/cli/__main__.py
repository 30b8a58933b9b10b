"""`python -m diffusers_perfusion.cli`."""

import sys

from . import main

sys.exit(main())
