#!/usr/bin/env bash
# Guess: `import deepspeed` loads no experiment tracker; DeepSpeed's monitor talks to one only if the config asks for it.
# Found: DeepSpeed 0.19.8 imports MLflow whenever MLflow is installed. deepspeed.runtime.config imports
#   deepspeed.autotuning for its config class, that package's __init__ imports the autotuner, and the autotuner imports
#   mlflow at module level in a try block.
# Why it matters here: every rank of a training imports DeepSpeed, and a training environment has MLflow, so each rank
#   pays MLflow's import (several seconds of processor time) and its memory although only rank 0 tracks anything.
# Exit: 0 as described, 1 if the behaviour changed, 2 if it could not run.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
pip="$folder/venv/bin/python -m pip --disable-pip-version-check install --quiet"
$pip torch==2.13.0 setuptools ninja==1.13.2 || exit 2
$pip --no-build-isolation deepspeed==0.19.8 || exit 2
ask() {
    DS_ACCELERATOR=cpu "$folder/venv/bin/python" - 2>/dev/null <<'PY' | tail -n 1
import resource
import sys

import deepspeed

seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime
print("mlflow" in sys.modules, deepspeed.__version__, f"{seconds:.1f}")
PY
}
read -r without version seconds_without < <(ask) || exit 2
$pip mlflow==3.17.2 || exit 2
read -r with version seconds_with < <(ask) || exit 2
echo "DeepSpeed $version: MLflow imported where it is absent: $without ($seconds_without s of processor time);" \
    "where it is installed: $with ($seconds_with s)"
[ "$without" = False ] && [ "$with" = True ] && exit 0
exit 1
