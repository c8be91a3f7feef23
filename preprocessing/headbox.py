"""Landmarks smoothed over time, and from them the head box of each frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from preprocessing.spans import Span, spans_from_table, spans_to_table
from tccp.headbox import head_boxes
from tccp.landmarks import smooth


def fit_head_boxes(batch: pa.Table) -> pa.Table:
    """Spans of one person on screen with `landmarks_px` smoothed and `head_box` filled in.

    A span is fitted whole, before it is cut into clips, so that the box keeps its size through all of them. Spans that
    bring their head boxes (truth) stay as they are.
    """
    return spans_to_table(map(_fit, spans_from_table(batch)))


def _fit(span: Span) -> Span:
    if span.reason is not None or span.head_box is not None:
        return span
    assert span.landmarks_px is not None, "fit_head_boxes comes after find_tracks"
    points = smooth(span.landmarks_px).astype(np.float32)
    return replace(span, landmarks_px=points, head_box=head_boxes(points, span.confidence))
