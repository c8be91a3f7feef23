"""Reason codes: why a source or a frame is in no clip, what that means, and what the user can do about it.

Codes are stored in clip tables and reports, so they do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from preprocessing.spans import Span
from tccp.files import redacted

Group = Literal["film", "face", "speech", "cutting"]


@dataclass(frozen=True)
class Reason:
    """Texts for one code.

    title: a few words. meaning, advice: a sentence or two each, for the report page. group: sets the colour in charts.
    message: one line for the terminal; empty for problems of a whole file, whose message comes from the code that
    finds them.
    """

    title: str
    meaning: str
    advice: str
    group: Group
    message: str = ""


_COPY_AGAIN = "Copy or download the film again, then repeat the run: finished films are not processed again."
_NOTHING_TO_DO = "Nothing to do."

REASONS: dict[str, Reason] = {
    # A whole source
    "missing": Reason("no such file", "There is no file at this path.", "Check the path or the manifest.", "film"),
    "not_a_file": Reason(
        "not a file", "The path names a folder or a device.", "Give the path of the film itself.", "film"
    ),
    "unreadable": Reason(
        "cannot be read", "The file exists, but may not be opened.", "Check the file's permissions.", "film"
    ),
    "empty_file": Reason("empty file", "The file has 0 bytes.", _COPY_AGAIN, "film"),
    "not_media": Reason(
        "not a film",
        "The file contains no video or audio of a known format, whatever its name says.",
        "Remove it from the folder.",
        "film",
    ),
    "no_index": Reason(
        "index missing",
        "The file was cut short before its index was written, so it cannot be played.",
        _COPY_AGAIN,
        "film",
    ),
    "truncated": Reason(
        "cut short", "The file ends before the film does. Clips before that point are kept.", _COPY_AGAIN, "film"
    ),
    "corrupt": Reason(
        "damaged",
        "The decoder found damaged data. Clips before that point are kept.",
        "Restore the film from its source.",
        "film",
    ),
    "unsupported": Reason(
        "unknown format",
        "The codec or the picture layout is not supported.",
        "Convert the film to MP4 with H.264 and AAC.",
        "film",
    ),
    "no_video": Reason("no pictures", "The file has sound only.", "Give the film that the sound belongs to.", "film"),
    "no_audio": Reason(
        "no sound",
        "The film has no sound, so speakers cannot be found.",
        "Give a version with sound.",
        "film",
    ),
    "empty_video": Reason("no pictures inside", "The video stream contains no pictures.", _COPY_AGAIN, "film"),
    "empty_audio": Reason("no sound inside", "The audio stream contains no samples.", _COPY_AGAIN, "film"),
    "not_finite": Reason(
        "broken sound", "The sound contains values that are not finite numbers.", "Export it again.", "film"
    ),
    "bad_audio": Reason("unusable sound", "The sound can be decoded but not used.", "Export it again.", "film"),
    "duplicate": Reason(
        "duplicate", "Another film has exactly the same content; it is used once.", _NOTHING_TO_DO, "film"
    ),
    "unsafe": Reason(
        "beyond the limits",
        "The picture size, the length or the number of streams exceeds the limits for untrusted files.",
        "If you trust the film, convert it to an ordinary size.",
        "film",
    ),
    "too_long_to_decode": Reason(
        "took too long",
        "Decoding reached its time limit and was stopped.",
        "Convert the film, or cut it into shorter ones.",
        "film",
    ),
    "decoder_crashed": Reason(
        "decoder crashed",
        "The decoder crashed on this file; other films are not affected.",
        "Restore the film from its source, or convert it.",
        "film",
    ),
    "no_truth": Reason(
        "no truth file",
        "The backend `truth` needs RoundTable's truth file beside the film.",
        "Use another backend.",
        "film",
    ),
    "other_truth": Reason(
        "truth of another film",
        "The truth file beside the film belongs to another film.",
        "Write both again with tccp synth.",
        "film",
    ),
    "bad_identity": Reason(
        "identity picture broken",
        "The identity picture beside the film cannot be read.",
        "Write both again with tccp synth.",
        "film",
    ),
    "no_person_network": Reason(
        "person cannot be compared",
        "The manifest names the person to keep, and the weights of SFace, which compare faces, are missing.",
        "Give tccp weights fetch sface, or leave the column person out; then repeat the run.",
        "film",
    ),
    "bad_person": Reason(
        "person picture unusable",
        "The picture of the person to keep is missing, is not a picture, or does not show one face clearly.",
        "Give a picture of the person's face, from the front and alone, then repeat the run.",
        "film",
    ),
    # Single frames. Where several of these apply to a frame, the last one counts: it came nearest to a clip.
    "before_video": Reason(
        "before the picture",
        "The sound plays before the first picture.",
        _NOTHING_TO_DO,
        "film",
        message="the sound starts before the picture",
    ),
    "after_audio": Reason(
        "after the sound",
        "The picture continues after the sound has ended.",
        "If there should be sound, export the film again.",
        "film",
        message="the picture continues after the end of the sound",
    ),
    "no_face": Reason(
        "no face",
        "No face was found: landscapes, backs, full profiles, faces far away.",
        "Normal for most footage. If faces were missed, try another --backend.",
        "face",
        message="no face was found; give film of one person's face",
    ),
    "not_speaking": Reason(
        "does not speak",
        "A face is visible, but the voice belongs to someone else: a listener, a voice-over, or silence.",
        "Normal in conversations. If speakers were missed, look at the tracks left out, below: with the weights of a "
        "speech network the decision is more reliable, and --speakers main keeps people whether they speak or not.",
        "speech",
        message="no person in the picture speaks; --speakers main keeps people whether they speak or not",
    ),
    "several_speak": Reason(
        "several speak",
        "Several people speak at once, so the sound belongs to no single mouth.",
        _NOTHING_TO_DO,
        "speech",
        message="several people speak at once, or it is unclear which one speaks",
    ),
    "other_person": Reason(
        "another person",
        "The face is not that of the reference pictures.",
        "If the person was missed, give more reference pictures, or clearer ones.",
        "speech",
        message="the face is not that of the reference pictures",
    ),
    "too_turned": Reason(
        "turned away",
        "The head is turned so far that half of the mouth is hidden.",
        "Normal; or raise the bound on yaw.",
        "face",
        message="the face is turned away too far",
    ),
    "too_small": Reason(
        "face too small",
        "The face has too few pixels to learn from.",
        "Give the film at a higher resolution, or lower the bound on face size.",
        "face",
        message="the face is too small",
    ),
    "jittery": Reason(
        "unsteady landmarks",
        "The 68 points jump from frame to frame, so not all of them can be right.",
        "Look at such a track below; another --backend may find better landmarks.",
        "face",
        message="the landmarks jump from frame to frame: the face is too dark, too blurred or partly hidden",
    ),
    "occluded": Reason(
        "mouth covered",
        "A hand, a microphone or another object covers the mouth.",
        _NOTHING_TO_DO,
        "face",
        message="something covers the mouth",
    ),
    "bridged": Reason(
        "face often lost",
        "The detector lost the face in too many frames, so that landmarks there would be guesses.",
        "Look at such a track below; another --backend may find the face, or raise --max-bridged.",
        "face",
        message="the face is lost in too many frames",
    ),
    "no_context": Reason(
        "no scene visible",
        "The head box covers nearly the whole picture, so that nothing of the scene is visible around it.",
        "Give the film before it was cropped to the face, or lower --min-visible.",
        "face",
        message="the head covers nearly the whole picture; give film that shows more of the scene",
    ),
    "too_dark": Reason(
        "too dark",
        "The face is nearly black.",
        "Brighten the film, or lower the bound.",
        "face",
        message="the face is too dark",
    ),
    "too_bright": Reason(
        "too bright",
        "The face is nearly white.",
        "Darken the film, or raise the bound.",
        "face",
        message="the face is too bright",
    ),
    "too_blurred": Reason(
        "too blurred",
        "The face is out of focus, moves too fast, or is compressed too much.",
        "Give a better copy, if there is one.",
        "face",
        message="the face is too blurred",
    ),
    "too_short": Reason(
        "too short",
        "The stretch between two cuts or gaps is shorter than the shortest clip.",
        "Lower --min-clip-s.",
        "cutting",
        message="too few consecutive frames of a speaking face for a clip",
    ),
    "no_identity": Reason(
        "no identity picture",
        "No frame outside the clip shows the same person well enough.",
        "Give longer footage of that person.",
        "cutting",
        message="no frame outside the clip shows the person",
    ),
    "identity": Reason(
        "identity picture",
        "A few frames of a short stretch are not used in a clip: they are its identity pictures.",
        _NOTHING_TO_DO,
        "cutting",
        message="reserved for the identity picture of the preceding clip",
    ),
}
FRAME_REASONS = [code for code, reason in REASONS.items() if reason.message]
"""Codes of single frames, in ascending order of rank."""
RANK = {code: rank for rank, code in enumerate(FRAME_REASONS)}


def set_aside(span: Span, code: str) -> Span:
    """The span, excluded for a reason of FRAME_REASONS, with that reason's message."""
    return span.set_aside(code, f"{redacted(span.path)}: {REASONS[code].message}")


def explain(code: str) -> Reason:
    """The texts for a code. A code that is not in the table is shown as it is."""
    unknown = Reason(code.replace("_", " "), "Preprocessing left this out.", "See the message of the film.", "film")
    return REASONS.get(code, unknown)
