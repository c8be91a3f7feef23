"""Measures whether the memory of `tccp generate` grows with film length: `python benchmarks/generation.py` prints JSON.

Each run is a separate process, as for users. The pipeline holds small random networks, because only the memory of the
code around the networks could grow. The default lengths take some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tccp.config import override, toy
from tccp.inference.pipeline_folder import write_untrained
from tccp.roundtable import identity_path, write_clips

SMALL = {
    "picture_px": 32,
    "network.base_channels": 16,
    "network.channel_multipliers": (1, 2),
    "network.blocks_per_scale": 1,
    "network.attention_head_dim": 16,
}

_GENERATE = """
import sys
from tccp.cli import main
main(sys.argv[1:])
status = open("/proc/self/status").read()
print("peak_kib", next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), file=sys.stderr)
"""


def peak_mib(arguments: list[str]) -> float:
    """Peak resident memory of `tccp generate` in MiB, from VmHWM: ru_maxrss would include the parent process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _GENERATE, "generate", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stderr.split()[-1]) / 1024


def measure(folder: Path, seconds: list[float]) -> dict[str, Any]:
    """Peak memory for each length of sound, and the ratio of the last to the first."""
    weights = folder / "weights"
    write_untrained(weights, override(toy(), SMALL))
    rows = []
    for length in seconds:
        (film,) = write_clips(folder / f"{length:g}", 1, length, seed=1)
        out = folder / f"{length:g}.mp4"
        started = time.monotonic()
        arguments = {"scene": film, "audio": film, "identity": identity_path(film), "weights": weights, "out": out}
        peak = peak_mib([f"--{name}={value}" for name, value in arguments.items()] + ["--truth", "--steps=1"])
        rows.append({"seconds": length, "peak_mib": round(peak, 1), "took_s": round(time.monotonic() - started, 1)})
    return {"generate": rows, "peak_ratio": round(rows[-1]["peak_mib"] / rows[0]["peak_mib"], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 120.0], help="lengths of sound to compare")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), seconds)))


if __name__ == "__main__":
    main()
