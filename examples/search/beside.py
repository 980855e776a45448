"""Import this first: the parts of the training script lie in the folder above, also for a notebook."""

import sys
from pathlib import Path

_EXAMPLES = str(Path(__file__).resolve().parents[1])
if _EXAMPLES not in sys.path:
    sys.path.append(_EXAMPLES)
