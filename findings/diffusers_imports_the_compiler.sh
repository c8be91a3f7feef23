#!/usr/bin/env bash
# Guess: torch loads its compiler (torch._dynamo, with sympy and torch.distributed.tensor) only when something is
#   compiled: torch/_compile.py says that it imports it late for this purpose. So a program that imports diffusers and
#   compiles nothing does not load it.
# Found: diffusers 0.42.1 imports torch._dynamo in diffusers/utils/torch_utils.py, for one decorator, and every part of
#   diffusers imports that module. `from diffusers import ConfigMixin` loads 93 modules of torch._dynamo. That takes
#   about as much CPU time as `import torch` itself (1.2 s each, torch 2.13.0 without CUDA).
# Why it matters here: each command, Ray actor and training rank imports diffusers for the auto-encoder and for network
#   parts. Of the imports of `tccp generate`, the compiler takes a quarter (1.9 of 7.8 s, python -X importtime).
# Exit: 0 as described, 1 if the behaviour changed, 2 if it could not run.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet torch==2.13.0 numpy diffusers==0.42.1 || exit 2
"$folder/venv/bin/python" -c 'from diffusers import ConfigMixin' || exit 2  # compiles the modules
"$folder/venv/bin/python" - <<'PY'
import sys
import time

started = time.process_time()
import torch

loaded = time.process_time()
before = sum(name.startswith("torch._dynamo") for name in sys.modules)
import torch._dynamo

compiler = time.process_time()
print(f"torch {torch.__version__}: import torch takes {loaded - started:.1f} CPU s and loads {before} modules of the compiler;")
print(f"the compiler takes {compiler - loaded:.1f} CPU s more")
PY
modules=$("$folder/venv/bin/python" -c '
import sys
from diffusers import ConfigMixin
print(sum(name.startswith("torch._dynamo") for name in sys.modules))') || exit 2
echo "from diffusers import ConfigMixin (diffusers 0.42.1) loads $modules modules of the compiler"
[ "$modules" -gt 20 ] && exit 0
exit 1
