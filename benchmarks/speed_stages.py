"""A worker of benchmarks/speed.py: the CPU time of each part of `tccp generate`, in one thread.

The parts are timed from outside, by wrapping the functions that generation calls.
"""

from __future__ import annotations

import functools
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from speed_workers import serve

from tccp import headbox
from tccp.diffusion import chains
from tccp.inference import film_generation, film_windows
from tccp.inference.encoding import Encoder
from tccp.inference.film import FilmRequest
from tccp.inference.pipeline import Pipeline, generate_film
from tccp.media import VideoWriter
from tccp.models.lip_sources import LipSource
from tccp.models.variants import VARIANTS


class Clock:
    """CPU time of this thread by part. Time in a part that another one calls belongs to the inner one."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._open = ["other"]
        self._since = time.thread_time()

    def _settle(self) -> None:
        now = time.thread_time()
        self.spent[self._open[-1]] += now - self._since
        self._since = now

    def call(self, part: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        self._settle()
        self._open.append(part)
        try:
            return function(*given, **named)
        finally:
            self._settle()
            self._open.pop()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Replaces a function of a module or class by one that is timed."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*given: Any, **named: Any) -> Any:
            return self.call(part, function, *given, **named)

        setattr(owner, name, timed)

    def items(self, part: str, source: Iterable[Any]) -> Iterator[Any]:
        """The items of an iterable that is timed."""
        iterator = iter(source)
        while (item := self.call(part, next, iterator, None)) is not None:
            yield item

    def total(self) -> float:
        self._settle()
        return sum(self.spent.values())


def _watch(clock: Clock, pipeline: Pipeline) -> None:
    stage_of = {id(network): VARIANTS[name].generates for name, network in pipeline.networks.items()}
    run_windows, scene_frames = chains.run_windows, film_generation.scene_frames

    def timed_windows(model: Any, *given: Any) -> Any:
        kind = stage_of[id(getattr(model, "network", model))]
        return clock.call("stage 1" if kind == "landmark" else "stage 2", run_windows, model, *given)

    chains.run_windows = timed_windows
    film_generation.scene_frames = lambda *given: clock.items("read", scene_frames(*given))
    for name in ("masked_scenes", "mel_windows"):
        clock.wrap(film_windows, name, "masks, mel and lips")
    clock.wrap(LipSource, "lips", "masks, mel and lips")
    clock.wrap(Encoder, "encode", "encode")
    clock.wrap(Encoder, "decode", "decode")
    clock.wrap(headbox, "paste", "paste")
    clock.wrap(VideoWriter, "write", "write")
    clock.wrap(VideoWriter, "__exit__", "write")


def stages(film: str, steps: int | None = None, weights: str = "toy") -> dict[str, Any]:
    """CPU ms per frame of each part of generating a film into itself; networks are loaded and recorded before.

    processes: the process that decodes the film and the sound, and the encoder's threads. other: everything else, with
    the start of a film.
    """
    pipeline = Pipeline.from_pretrained(weights)
    given = Path(film)
    out = given.with_name("stages.mp4")
    request = FilmRequest(given, given, given, weights=weights, out=out, truth=True, steps=steps, overlap=False)
    generate_film(request, pipeline=pipeline)
    clock = Clock()
    _watch(clock, pipeline)
    before = _cpu_s()
    clock._since = time.thread_time()
    frames = generate_film(request, pipeline=pipeline).frames
    in_thread = clock.total()
    everything = _cpu_s() - before
    parts = clock.spent | {"processes": max(0.0, everything - in_thread)}
    return {
        "frames": frames,
        "cpu_ms_per_frame": {part: round(1000 * seconds / frames, 3) for part, seconds in sorted(parts.items())},
        "total_cpu_ms_per_frame": round(1000 * everything / frames, 3),
    }


def _cpu_s() -> float:
    """CPU time of this process and of its child processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    serve({"stages": stages})
