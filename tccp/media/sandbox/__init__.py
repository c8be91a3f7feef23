"""Decoding of untrusted media files in a child process.

FFmpeg's decoders are written in C. A damaged or hostile file may crash one, make it hang or make it take all memory.
Here this costs one file: the child process has limits and few rights, and the parent replaces it when it dies or stops
answering.

The parent trusts nothing that the child sends. Messages are checked by pydantic models whose fields are all bounded,
pictures and sound travel through shared memory of a fixed size, and the child cannot write files.
"""

from tccp.media.sandbox.limits import Limits
from tccp.media.sandbox.parent import Decoder, SoundFile

__all__ = ["Decoder", "Limits", "SoundFile"]
