"""Why a frame is in no clip: codes, which do not change, and what they say to people."""

from __future__ import annotations

from preprocessing.spans import Span
from tccp.files import redacted

# Of several reasons why a frame is in no clip, the one that came nearest to a clip counts: the last of these.
REASONS = {
    "before_video": "sound without a picture yet",
    "after_audio": "picture after the end of the sound",
    "no_face": "nobody's face is to be seen; give film of one person's face",
    "not_speaking": "nobody in the picture is seen to speak; --speakers main takes people whether they speak or not",
    "several_speak": "several people seem to speak at once, or it is not clear who of them does",
    "other_person": "somebody else than the person who is wanted",
    "too_turned": "the face is turned away too far",
    "too_small": "the face is too small",
    "jittery": "the landmarks tremble: the face is too dark, too blurred or partly hidden",
    "occluded": "something is in front of the mouth",
    "too_dark": "the face is too dark",
    "too_bright": "the face is too bright",
    "too_blurred": "the face is too blurred",
    "too_short": "too few frames of a speaking face in a row for a clip",
    "no_identity": "no frame outside the clip shows the person",
    "identity": "kept back for the identity picture of the clip before",
}
RANK = {reason: rank for rank, reason in enumerate(REASONS)}


def set_aside(span: Span, reason: str) -> Span:
    """A span out, with the reason in words."""
    return span.set_aside(reason, f"{redacted(span.path)}: {REASONS[reason]}")
