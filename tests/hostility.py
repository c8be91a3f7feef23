"""Puts a hostile child in the place of the sandbox's own and sees what becomes of the parent."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tccp.media import MediaError, probe
from tccp.media.sandbox import Decoder, Limits
from tccp.media.sandbox.messages import MediaAnswer

SILENCE_S = 0.3


@dataclass
class Outcome:
    """reasons: how many messages ended in which MediaError. longest_s: of one message. accepted: without an error."""

    reasons: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    accepted: list[int] = field(default_factory=list)


@contextmanager
def hostile_children(folder: Path, film: Path) -> Iterator[Callable[[int], None]]:
    """Within the context, new children are hostile; call the result with the number of the next one's message."""
    script = folder / "hostile"
    program = Path(__file__).with_name("hostile_child.py")
    script.write_text(f"#!{sys.executable} -SE\nimport runpy\nrunpy.run_path({str(program)!r}, run_name='__main__')\n")
    script.chmod(0o700)
    executable = sys.executable
    try:
        sys.executable = str(script)
        os.environ["PYTHON_HOSTILE_INFO"] = MediaAnswer.of(1, probe(film)).model_dump_json()

        def choose(number: int) -> None:
            os.environ["PYTHON_HOSTILE"] = str(number)

        yield choose
    finally:
        sys.executable = executable
        for name in ("PYTHON_HOSTILE", "PYTHON_HOSTILE_INFO"):
            os.environ.pop(name, None)


def face(number: int, film: Path, outcome: Outcome) -> None:
    """Asks one hostile child for something, and counts the error."""
    began = time.monotonic()
    with Decoder(Limits(stall_s=SILENCE_S, max_duration_s=60)) as decoder:
        calls: list[Callable[[], object]] = [
            lambda: [decoder.probe(film) for _ in range(2)],
            lambda: list(decoder.frames(film)),
            lambda: decoder.sound(film),
            lambda: list(decoder.film_sound(film).blocks),
            lambda: decoder.picture(film),
            lambda: list(decoder.frames_at(film, [2, 5])),
        ]
        try:
            calls[number % 6]()
            outcome.accepted.append(number)
        except MediaError as error:
            outcome.reasons[error.reason if str(error).isprintable() else "unprintable"] += 1
    outcome.longest_s = max(outcome.longest_s, time.monotonic() - began)
