#!/usr/bin/env bash
# Guess: casting a diffusers model that keeps no module in single precision, `model.to(torch.bfloat16)`, is silent.
#   The warning about modules "that should be kept in float32" is for models that name such modules.
# Found: diffusers 0.42.1 warns on every cast of every model loaded by from_pretrained, even to the type that it has, and
#   names an empty list: from_pretrained turns the class's None into [], and `to` asks only whether it is not None.
#   A model that was constructed, not loaded, is cast in silence. The casts themselves are right.
# Why it matters here: a pipeline of five networks prints five long warnings that tell users to change nothing. So
#   `Pipeline.from_pretrained` hands its dtype to each component's from_pretrained and casts nothing afterwards.
# Exit: 0 as described, 1 if the behaviour changed, 2 if it could not run.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
pip="$folder/venv/bin/python -m pip --disable-pip-version-check install --quiet"
$pip torch==2.13.0 || exit 2
$pip diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 || exit 2
"$folder/venv/bin/python" - "$folder/model" <<'PY'
import io
import logging
import sys

import diffusers
import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging

heard = io.StringIO()
logging.getLogger("diffusers").addHandler(logging.StreamHandler(heard))
diffusers_logging.set_verbosity_warning()


def warned(model, dtype):
    heard.seek(0)
    heard.truncate()
    model.to(dtype)
    return "should be kept in float32: []" in heard.getvalue()


made = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
made.save_pretrained(sys.argv[1])
loaded = AutoencoderKL.from_pretrained(sys.argv[1])
found = {
    "constructed, to bfloat16": warned(made, torch.bfloat16),
    "loaded, to float32, which it is": warned(loaded, torch.float32),
    "loaded, to bfloat16": warned(loaded, torch.bfloat16),
}
right = {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
print(f"diffusers {diffusers.__version__}: warns of an empty list: {found}; cast right: {right}")
sys.exit(0 if list(found.values()) == [False, True, True] and right else 1)
PY
code=$?
[ $code -le 1 ] && exit $code
exit 2
