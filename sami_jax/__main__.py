"""`python -m sami_jax` is `sami`."""

import sys

from sami_jax.cli.main import main

sys.exit(main())
