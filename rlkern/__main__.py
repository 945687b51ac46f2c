"""``python -m rlkern``."""

import sys

from rlkern.cli import main

sys.exit(main())
