#!/usr/bin/env bash
# Guess: two packages for reading films and pictures can be imported in any order; each brings its own libraries.
# Found: after `import decord` (0.6.0), cv2 (opencv-python 4.14.0.94) still writes PNG, but cv2.imdecode returns None for
#   every PNG, with "libpng error: bad parameters to zlib" on stderr. The other order works. JPEG works in both orders.
#   decord loads its zlib so that later libraries use it in place of their own.
# Why it matters here: a PNG portrait was refused as "not a readable picture" in processes that had imported decord, so
#   tests passed or failed with their order. The tests now import cv2 first, and the product does not import decord.
# Exit: 0 as described, 1 if the behaviour changed, 2 if it could not run.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet \
    decord==0.6.0 opencv-python==4.14.0.94 numpy==2.4.6 || exit 2
reads() {
    "$folder/venv/bin/python" - "$1" 2>/dev/null <<'PY'
import importlib
import sys

for name in sys.argv[1].split(","):
    importlib.import_module(name)
import cv2
import numpy as np

picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
found = [cv2.imdecode(cv2.imencode(kind, picture)[1], cv2.IMREAD_COLOR) is not None for kind in (".png", ".jpg")]
print(*found)
PY
}
decord_first=$(reads decord,cv2) || exit 2
cv2_first=$(reads cv2,decord) || exit 2
echo "decord 0.6.0, opencv-python 4.14.0.94; PNG and JPEG are read: $decord_first with decord first, $cv2_first with cv2"
[ "$decord_first" = "False True" ] && [ "$cv2_first" = "True True" ] && exit 0
exit 1
