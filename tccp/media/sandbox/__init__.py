"""Media files are decoded in a child process, for nobody knows what is in them.

FFmpeg's hundreds of decoders are written in C, and a damaged or hostile file may crash one, hang it or have it take all
memory. Here that costs one file: the child has limits and few rights, and is replaced when it dies or falls silent.

The parent believes nothing that the child says: messages are JSON and checked, pictures travel through memory of a
fixed size, and the child opens no file for writing.
"""

from tccp.media.sandbox.limits import Limits
from tccp.media.sandbox.parent import Decoder, SoundFile

__all__ = ["Decoder", "Limits", "SoundFile"]
