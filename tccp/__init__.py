"""TCCP: a talking head, generated into a scene from audio, a masked video and a picture."""

__version__ = "0.1.0"
