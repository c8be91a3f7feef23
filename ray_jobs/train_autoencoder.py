"""Training of the auto-encoder, on a Ray cluster.

    ray job submit --working-dir . -- python ray_jobs/train_autoencoder.py [KEY=VALUE ...] [--storage URL] ...

`--help` lists the options. A job's folder is a throw-away copy: all that is kept goes to --storage.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a job's folder is no installed package

from ray_jobs.train_command import run

if __name__ == "__main__":
    run("autoencoder")
