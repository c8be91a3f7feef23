"""RoundTable: procedural conversation scenes with sound and ground truth. The project's built-in data set."""

from tccp.roundtable.film_files import (
    FILMS_VERSION,
    identity_path,
    read_identity,
    read_truth,
    truth_path,
    write_clip,
    write_clips,
)
from tccp.roundtable.people import Person, make_person
from tccp.roundtable.world import RoundTableClip, Truth, identity_picture, synthesise

__all__ = [
    "FILMS_VERSION",
    "Person",
    "RoundTableClip",
    "Truth",
    "identity_path",
    "identity_picture",
    "make_person",
    "read_identity",
    "read_truth",
    "synthesise",
    "truth_path",
    "write_clip",
    "write_clips",
]
