"""Speed of drawing RoundTable films on one core: `python benchmarks/roundtable.py` prints one JSON object.

Times are CPU times, so other processes on the machine do not count.
"""

from __future__ import annotations

import json
import time

import cv2
import numpy as np

from tccp.config import FPS
from tccp.roundtable import synthesise

CLIPS, SECONDS = 8, 4.0


def main() -> None:
    cv2.setNumThreads(1)
    synthesise(0, 0.2).render(0)
    start = time.process_time()
    clips = [synthesise(seed, SECONDS) for seed in range(CLIPS)]
    prepared = time.process_time()
    num_frames = sum(clip.num_frames for clip in clips)
    for clip in clips:
        for _ in clip.frames():
            pass
    drawn = time.process_time()
    print(
        json.dumps(
            {
                "scene_px": [clips[0].width, clips[0].height],
                "head_px": float(np.mean([clip.head_box[0, 2] - clip.head_box[0, 0] for clip in clips])),
                "frames": num_frames,
                "render_frames_per_s": round(num_frames / (drawn - prepared), 1),
                "synthesise_seconds_per_s": round(CLIPS * SECONDS / (prepared - start), 1),
                "all_frames_per_s": round(num_frames / (drawn - start), 1),
                "times_real_time": round(num_frames / (drawn - start) / FPS, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
