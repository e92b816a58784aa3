"""All benchmarks: what the four models cost, and every body of every edifice op alone.

    python benchmarks                           both, with default sizes: about a quarter of an hour
    python benchmarks --quick                   tiny models and short sequences, to see that it works; printed alone

It needs matplotlib: the extra `bench`. models.py and ops.py say what is measured, and run alone too.
"""

from __future__ import annotations

import sys

import models
import ops
from request import read_request

if __name__ == "__main__":
    read_request(__doc__, (), None)
    models.main()
    sys.exit(ops.main())
