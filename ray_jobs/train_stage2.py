"""Trains stage 2, from landmarks to faces (face_first, face_sequence), on a Ray cluster.

    ray job submit --working-dir . -- python ray_jobs/train_stage2.py [--preset NAME] [--set KEY=VALUE ...] ...

`--help` lists the options. A job runs in a temporary copy of the code; its results go to --storage.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a job's folder is not an installed package

from ray_jobs.train_command import run

if __name__ == "__main__":
    run("stage2")
