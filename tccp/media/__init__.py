"""Probe, decode, encode and mux: any film in, the model's clock out, and back.

**The clock.** Output frame i is the picture on show at exactly i/25 s after the *common start* of the file: the
presentation time of whatever comes first, the first picture or the first audible sample of the streams chosen. Before
the first picture its first one is held, before the first sample there is silence, so nothing that was recorded is
lost and sound and picture stay where the file puts them. `num_frames` counts every i with i/25 s before the end of
the last picture (a ceiling: no tail is lost). All of it is rational arithmetic on the file's own timestamps; no frame
rate is ever assumed. Sound is counted on its own, because it may be longer or shorter than the pictures:
`fit_samples` makes it exactly as long as a number of frames.

**Streams.** The video stream the container itself prefers (default flag, then resolution), and the audio stream that
goes with it. Cover art is not video. Pictures come upright and mirrored as the display matrix says, RGB.
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
