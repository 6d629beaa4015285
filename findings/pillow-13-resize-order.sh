#!/usr/bin/env bash
# Pillow 13.0.0: resize() gives other pixels than 12.3.0 and all before it, for pictures that lose much of their height.
#
# A resize is two passes, each rounded to 8 bits. Up to 12.3.0 the rows come first; 13.0.0 begins with the columns where
# more is taken from the height than twice what is taken from the width. torchvision's Resize(256) of a picture more than
# twice as high as wide, such as a telephone's screenshot, is one of these: so a network that was trained on one version
# and runs behind the other does not see the same pixels. Two calls, one per pass, give the same in both.
#
# Seen with Pillow 12.3.0 and 13.0.0, bicubic, on noise of black and white: up to 7 of 255 levels where 1080 x 2340 become
# 256 x 554, and up to 29 where 200 x 300 become 224 x 224, as by Resize((224, 224)).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/resize.py" <<'PYTHON'
import sys

import numpy as np
from PIL import Image

kind, found = Image.Resampling.BICUBIC, {}
for name, (width, height), size in (
    ("Resize(256) of 1080 x 2340", (1080, 2340), (256, 554)),
    ("Resize((224, 224)) of 200 x 300", (200, 300), (224, 224)),
    ("Resize(256) of 640 x 427", (640, 427), (383, 256)),
):
    hard = np.random.default_rng(0).integers(0, 2, (height, width), np.uint8) * 255
    picture = Image.fromarray(hard)
    found[f"{name}, at once"] = picture.resize(size, kind)
    found[f"{name}, rows first"] = picture.resize((size[0], height), kind).resize(size, kind)
    found[f"{name}, columns first"] = picture.resize((width, size[1]), kind).resize(size, kind)
np.savez(sys.argv[1], **{name: np.asarray(made) for name, made in found.items()})
PYTHON
for version in 12.3.0 13.0.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet pillow==$version numpy==2.4.6
  "$folder/$version/bin/python" "$folder/resize.py" "$folder/$version.npz"
done
"$folder/13.0.0/bin/python" - "$folder/12.3.0.npz" "$folder/13.0.0.npz" <<'PYTHON'
import sys

import numpy as np

old, new = (np.load(path) for path in sys.argv[1:])
for name in sorted({key.rpartition(",")[0] for key in old.files}):
    at_once, rows, columns = (f"{name}, {how}" for how in ("at once", "rows first", "columns first"))
    assert np.array_equal(old[rows], new[rows]) and np.array_equal(old[columns], new[columns])
    assert np.array_equal(old[at_once], old[rows]), "Pillow 12.3.0 does not begin with the rows"
    expected = new[columns] if "640" not in name else new[rows]
    assert np.array_equal(new[at_once], expected), "this finding is out of date"
    apart = np.abs(old[at_once].astype(int) - new[at_once])
    print(f"{name}: {100 * (apart > 0).mean():.1f} % of pixels differ, by up to {apart.max()} of 255 levels")
PYTHON
