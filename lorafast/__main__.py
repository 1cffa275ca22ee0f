"""``python -m lorafast``."""

import sys

from lorafast.cli import main

sys.exit(main())
