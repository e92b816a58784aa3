"""All benchmarks: what the four models cost, and every body of every edifice op alone.

    python benchmarks                   both, with default sizes: about fifteen minutes
    python benchmarks --quick           tiny models and short sequences, to see that it works
    python benchmarks --output DIR      instead of the folder of the processor's name in benchmarks/results

It needs matplotlib: the extra `bench`. models.py and ops.py say what is measured, and run alone too.
"""

from __future__ import annotations

import argparse
import sys

import models
import ops

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="tiny models, short sequences and few rounds")
parser.add_argument("--output", help="folder to write to [default: results/PROCESSOR beside this file]")
parser.parse_args()
models.main(sys.argv[1:])
sys.exit(ops.main(sys.argv[1:]))
