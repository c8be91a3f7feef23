"""Probes, decodes, encodes and muxes media files, and converts their timing to and from the model's 25 fps clock.

**The clock.** Output frame i is the picture that the file shows exactly i/25 s after its *common start*: the
presentation time of the first picture or of the first audible sample of the chosen streams, whichever is earlier.
Before the first picture, frames repeat it; before the first sample, there is silence. So nothing recorded is lost, and
sound and picture keep the offset that the file gives them. `num_frames` counts every i with i/25 s before the end of
the last picture (rounded up, so no tail is lost). The code uses rational arithmetic on the file's own timestamps and
never assumes a frame rate. Sound has its own count, because it may be longer or shorter than the pictures;
`fit_samples` gives it the exact length of a number of frames.

**Streams.** The video stream that the container prefers (default flag, then resolution), and the audio stream that
belongs to it. Cover art does not count as video. Pictures are RGB, turned and mirrored as the display matrix says.
"""

from tccp.media.pictures import read_frames
from tccp.media.sound import AudioTrack, fit_samples, open_audio, write_audio_wav
from tccp.media.source import MediaError, MediaInfo, probe
from tccp.media.writer import VideoWriter, mark_generated, read_metadata

__all__ = [
    "AudioTrack",
    "MediaError",
    "MediaInfo",
    "VideoWriter",
    "fit_samples",
    "mark_generated",
    "open_audio",
    "probe",
    "read_frames",
    "read_metadata",
    "write_audio_wav",
]
