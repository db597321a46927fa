"""Benchmarks of fastce; see README.md in this folder.

asv imports this package alone, without the folder it lies in, so that an installed fastce is what
it measures.  The oracle that accuracy is measured against lies there, so that folder comes last.
"""

import sys
from pathlib import Path

_root = str(Path(__file__).resolve().parent.parent)
if _root not in sys.path:
    sys.path.append(_root)
