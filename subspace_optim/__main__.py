"""``python -m subspace_optim`` is the ``subspace-optim`` command."""

import sys

from subspace_optim.cli import main

sys.exit(main())
