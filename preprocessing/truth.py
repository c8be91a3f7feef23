"""Landmarks and head boxes of RoundTable footage, from the truth files that were written beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from preprocessing.spans import Span, spans_from_table, spans_to_table
from tccp.config import TccpError
from tccp.roundtable import identity_path, read_truth


def read_tracks(batch: pa.Table) -> pa.Table:
    """What `find_tracks` and `fit_head_boxes` do for real film: one track per film, with its own identity picture.

    A film without a truth file beside it is set aside as `no_truth`; one that its truth file does not fit, as
    `other_truth`.
    """
    return spans_to_table(span if span.reason else _track(span) for span in spans_from_table(batch))


def _track(span: Span) -> Span:
    path = Path(span.path)
    try:
        truth = read_truth(path)
    except TccpError as error:
        return span.set_aside("no_truth", f"{path}: {error}")
    frames = len(truth.landmarks_px)
    if frames < span.stop_frame or (truth.width, truth.height) != (span.width, span.height):
        text = f"{path}: its truth is of {frames} frames of {truth.width}x{truth.height}; write both anew: tccp synth"
        return span.set_aside("other_truth", text)
    part = slice(span.start_frame, span.stop_frame)
    return replace(
        span,
        track=0,
        landmarks_px=truth.landmarks_px[part].astype(np.float32),
        confidence=np.ones(span.num_frames, np.float32),
        head_box=truth.head_box[part].astype(np.float32),
        identity_path=str(identity_path(path)),
    )
