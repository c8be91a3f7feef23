"""Probes, decodes, encodes and muxes media files, and converts their timing to and from the model's 25 fps clock.

**The clock** begins with the first picture, or as many whole frames earlier as sound that starts first needs. Output
frame i is the picture nearest to i/25 s on it. Before the first picture, frames repeat it; before the first sample,
there is silence. So nothing recorded is lost, and sound and picture keep the offset that the file gives them.
`num_frames` counts every i with i/25 s before the end of the last picture. The code uses rational arithmetic on the
file's own timestamps and never assumes a frame rate. Sound has its own count, because it may be longer or shorter than
the pictures; `fit_samples` gives it the exact length of a number of frames. docs/conventions.md says more.

**Streams.** The video stream that the container prefers (default flag, then resolution), and the audio stream that
belongs to it. Cover art does not count as video. Pictures are RGB as a display shows
them: upright, with square pixels, whole, and in BT.709.
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
