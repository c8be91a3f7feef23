"""Reason codes in plain words: what each means, and what somebody who misses those frames can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["film", "face", "speech", "cutting"]


@dataclass(frozen=True)
class Reason:
    """title: a few words. meaning, advice: a sentence or two each. group: which colours it takes."""

    title: str
    meaning: str
    advice: str
    group: Group


_AGAIN = "Copy or download the film again, then run again: only what is missing is done."
_NORMAL = "Nothing to do."

REASONS: dict[str, Reason] = {
    # Sources
    "missing": Reason("no such file", "There is nothing at this path.", "Check the path or the manifest.", "film"),
    "not_a_file": Reason("not a file", "This is a folder or a device.", "Name the film itself.", "film"),
    "unreadable": Reason("cannot be read", "The file is there but may not be opened.", "Check permissions.", "film"),
    "empty_file": Reason("empty file", "The file has 0 bytes.", _AGAIN, "film"),
    "not_media": Reason(
        "not a film",
        "The content is no film or recording, whatever the name says.",
        "Remove it from the folder.",
        "film",
    ),
    "no_index": Reason(
        "index missing", "The film was cut short before its index was written; it cannot be played.", _AGAIN, "film"
    ),
    "truncated": Reason(
        "cut short", "The file ends before the film does. Clips before that point are kept.", _AGAIN, "film"
    ),
    "corrupt": Reason(
        "damaged", "Decoding met damage. Clips before that point are kept.", "Restore the film from its source.", "film"
    ),
    "unsupported": Reason(
        "unknown format",
        "Codec or layout is not supported here.",
        "Convert the film to MP4 with H.264 and AAC.",
        "film",
    ),
    "no_video": Reason("no pictures", "The file has sound only.", "Give the film that belongs to it.", "film"),
    "no_audio": Reason(
        "no sound",
        "The film is silent; without sound nobody can be seen to speak.",
        "Give a version with sound.",
        "film",
    ),
    "empty_video": Reason("no pictures inside", "There is a picture track with nothing in it.", _AGAIN, "film"),
    "empty_audio": Reason("no sound inside", "There is a sound track with nothing in it.", _AGAIN, "film"),
    "not_finite": Reason("broken sound", "The sound holds values that are no numbers.", "Export it again.", "film"),
    "bad_audio": Reason("unusable sound", "The sound can be decoded but not used.", "Export it again.", "film"),
    "duplicate": Reason(
        "duplicate", "Another film has the same content, byte for byte; it is used once.", _NORMAL, "film"
    ),
    "unsafe": Reason(
        "beyond the limits",
        "Picture size, length or number of streams is beyond what is decoded from files nobody vouches for.",
        "Convert the film to an ordinary size, if you trust it.",
        "film",
    ),
    "too_long_to_decode": Reason(
        "took too long", "Decoding ran into its time limit and was stopped.", "Convert the film, or cut it.", "film"
    ),
    "decoder_crashed": Reason(
        "decoder crashed",
        "The file brought the decoder down; nothing else was harmed.",
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
        "truth of another film", "The truth file beside the film tells of another one.", "Make the pair again.", "film"
    ),
    "bad_identity": Reason(
        "identity picture broken",
        "The identity picture beside the film cannot be read.",
        "Make the pair again.",
        "film",
    ),
    # Frames
    "before_video": Reason("before the picture", "Sound that plays before the first picture.", _NORMAL, "film"),
    "after_audio": Reason(
        "after the sound",
        "Picture that goes on after the sound has ended.",
        "If it should have sound, export it again.",
        "film",
    ),
    "no_face": Reason(
        "no face",
        "Nobody's face was found: landscapes, backs, full profiles, faces far away.",
        "Normal for most footage. Were faces missed, try another --backend.",
        "face",
    ),
    "too_small": Reason(
        "face too small",
        "The face has too few pixels to learn from.",
        "Give the film at a higher resolution, or lower the bound on face size.",
        "face",
    ),
    "too_blurred": Reason(
        "too blurred",
        "Out of focus, moved too fast, or compressed too hard.",
        "Give a better copy, if there is one.",
        "face",
    ),
    "too_dark": Reason("too dark", "The face is nearly black.", "Brighten the film, or lower the bound.", "face"),
    "too_bright": Reason("too bright", "The face is nearly white.", "Darken the film, or raise the bound.", "face"),
    "too_turned": Reason(
        "turned away",
        "The head is turned so far that half of the mouth is hidden.",
        "Normal; or raise the bound on yaw.",
        "face",
    ),
    "occluded": Reason("mouth covered", "A hand, a microphone or something else is before the mouth.", _NORMAL, "face"),
    "jittery": Reason(
        "unsteady landmarks",
        "The 68 points jump from frame to frame, so they cannot all be right.",
        "Look at such a track below; another --backend may do better.",
        "face",
    ),
    "other_person": Reason(
        "another person",
        "The face is not that of the reference pictures.",
        "Give more, or clearer, reference pictures if the person was missed.",
        "speech",
    ),
    "not_speaking": Reason(
        "does not speak",
        "A face is seen, but the voice that is heard is not its own: a listener, a voice-over, or silence.",
        "Normal in conversations. Were speakers missed, look at the tracks left out, below: weights of a speech "
        "network judge better than the built-in rule, and --speakers main takes people whether they speak or not.",
        "speech",
    ),
    "several_speak": Reason(
        "several speak", "People speak at once, so the sound belongs to no single mouth.", _NORMAL, "speech"
    ),
    "too_short": Reason(
        "too short",
        "The stretch between two cuts or gaps is shorter than the shortest clip.",
        "Lower --min-clip-s.",
        "cutting",
    ),
    "identity": Reason(
        "identity picture", "A few frames of a short stretch, kept back to show who the person is.", _NORMAL, "cutting"
    ),
    "no_identity": Reason(
        "no identity picture",
        "No frame outside the clip shows the same person well enough.",
        "Give longer footage of that person.",
        "cutting",
    ),
}


def explained(code: str) -> Reason:
    """The reason behind a code; a code this page does not know yet is shown as it is."""
    unknown = Reason(code.replace("_", " "), "Set aside by the preprocessing.", "See the message of the film.", "film")
    return REASONS.get(code, unknown)
