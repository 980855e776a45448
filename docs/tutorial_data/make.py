"""Makes pictures.png, the 32 drawings of the tutorial: ``python docs/tutorial_data/make.py``, with ``[examples]``.

The drawings are Twemoji's, copyright Twitter, Inc and other contributors, CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), scaled and put on white, eight per row; the captions are ours.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIZE, COLUMNS = 72, 8
CODES = [
    "1f34e", "1f34f", "1f34c", "1f347", "1f34a", "1f353", "1f34b", "1f349",
    "1f352", "1f33b", "1f339", "1f337", "1f335", "1f332", "1f340", "1f341",
    "1f420", "1f438", "1f433", "1f980", "1f98b", "1f41e", "1f424", "1f437",
    "1f98a", "1f68c", "1f692", "1f695", "1f69c", "1f388", "1f308", "1f680",
]  # fmt: skip


def main() -> None:
    sys.path.insert(0, str(HERE.parents[1] / "examples"))
    from emoji_features import draw, find_drawings

    drawings = find_drawings()["twemoji"]
    cells = [np.asarray(draw(drawings[code], SIZE)) for code in CODES]
    rows = [np.concatenate(cells[start : start + COLUMNS], axis=1) for start in range(0, len(cells), COLUMNS)]
    sheet = Image.fromarray(np.concatenate(rows)).quantize(255, dither=Image.Dither.NONE)
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    (HERE / "pictures.png").write_bytes(data.getvalue())


if __name__ == "__main__":
    main()
