#!/usr/bin/env bash
# Pillow 13.0.0 resizes the columns of many upright pictures before the rows, where Pillow 12.2.0 and older began with the
# rows. Both round to uint8 between the two passes, so the same call gives other pixels: a model's inputs change with
# the installed Pillow. Remedy: two explicit resizes, the rows first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/resize.py" <<'PYTHON'
import sys

import numpy as np
from PIL import Image

noise = np.random.default_rng(0).integers(0, 256, (640, 427, 3), dtype=np.uint8)
image = Image.fromarray(noise)
one = np.asarray(image.resize((448, 448), Image.Resampling.BICUBIC))
rows_first = image.resize((448, 640), Image.Resampling.BICUBIC).resize((448, 448), Image.Resampling.BICUBIC)
difference = np.abs(one.astype(int) - np.asarray(rows_first))
print(f"{Image.__version__} differs from rows first by at most {difference.max()}, in {(difference > 0).mean():.1%}")
sys.exit(int(difference.max() > 0))
PYTHON
for version in 12.2.0 13.0.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "pillow==$version" numpy==2.4.6
done
"$folder/12.2.0/bin/python" "$folder/resize.py" || { echo "Pillow 12.2.0 is not as it was" >&2; exit 1; }
if "$folder/13.0.0/bin/python" "$folder/resize.py"; then
    echo "Pillow 13.0.0 resizes rows first: this finding is out of date" >&2
    exit 1
fi
