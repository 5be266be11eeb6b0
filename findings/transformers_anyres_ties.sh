#!/usr/bin/env bash
# LLaVA-1.6's config.json holds image_grid_pinpoints, and its first two entries are [336, 672] and [672, 336]. LLaVA's own
# code reads a pair as (width, height), transformers as (height, width). The set of sizes is the same either way, but of
# two that fit a picture alike both take the first: a square picture of at most 336 pixels becomes two tiles one above
# the other in LLaVA (llava/mm_utils.py select_best_resolution@c121f04), and side by side in transformers. So the model is
# served tiles that it was not trained on. Remedy for equal pixels: swap each pair, and keep their order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 pillow==12.2.0
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import sys

import transformers
from transformers.image_processing_utils import select_best_resolution

RELEASED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
height, width = select_best_resolution((300, 300), RELEASED)
swapped = select_best_resolution((300, 300), [pair[::-1] for pair in RELEASED])
print(f"transformers {transformers.__version__}: a picture of 300 x 300 goes on a canvas {width} wide and {height} high; "
      f"with each pair swapped {swapped[1]} wide and {swapped[0]} high")
if (width, height) != (672, 336) or tuple(swapped) != (672, 336):
    sys.exit("this finding is out of date")
PYTHON
