"""The clock of a file's streams. Where it starts again, as in films that were joined, its times are carried on.

A *run* is the packets of one stream between two restarts of its clock. Each run has a shift, which is added to the
times of its packets. Restarts of pictures and sound at the same place get the same shift, so that sound and pictures
keep their offset; it is the smallest with which neither stream overlaps the run before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import av

# Decoding times never decrease in a sound file. Smaller steps back are rounding or jitter.
_STEP_BACK_S = Fraction(1, 10)
# In formats with a free-running clock, a longer step forward of both streams joins two films.
_STEP_FORWARD_S = 10
# At a restart, the times of pictures and sound differ by no more than this.
_TOGETHER_S = 5
_REORDERED = 32  # pictures that may lie between two of the same time
MOST_RESTARTS = 1000
FREE_RUNNING = {"mpegts", "mpeg", "ogg", "flv", "aac", "mp3", "ac3", "eac3"}


@dataclass
class Run:
    """Timing of the packets of one run, in ticks of the stream's time base, before the shift.

    first_packet: number of the run's first packet within the stream. packets: those that are presented.
    first, last: earliest and latest presentation. leap: longest step between two packets.
    """

    first_packet: int
    packets: int = 0
    first: int = 0
    last: int = 0
    end: int = 0
    shortest: int = 0
    longest: int = 0
    leap: int = 0
    shift: int = 0

    def add(self, ticks: int, duration: int) -> None:
        if self.packets == 0:
            self.first, self.last, self.end, self.shortest = ticks, ticks, ticks + duration, duration
        self.packets += 1
        self.leap = max(self.leap, abs(ticks - self.last), duration)
        self.first, self.last = min(self.first, ticks), max(self.last, ticks)
        self.end = max(self.end, ticks + duration)
        self.shortest, self.longest = min(self.shortest, duration), max(self.longest, duration)

    @property
    def shifted_end(self) -> int:
        """The end after the shift. If packets state no duration, the last one gets the mean duration."""
        mean = round((self.last - self.first) / (self.packets - 1)) if self.packets > 1 and not self.longest else 0
        return self.end + mean + self.shift


@dataclass(frozen=True)
class Restart:
    """From packet number `packet` of the stream on, `shift` ticks are added to the times of its packets."""

    packet: int
    shift: int


@dataclass
class StreamTimeline:
    """The runs of one stream."""

    time_base: Fraction
    kind: str
    runs: list[Run] = field(default_factory=lambda: [Run(0)])
    num_packets: int = 0
    decoding_ticks: int | None = None
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=_REORDERED))
    repeated: int = 0
    delays: set[int | None] = field(default_factory=set)

    @property
    def constant_delay(self) -> int:
        """By how many ticks every packet is presented after its decoding time; 0 if this varies or is unknown."""
        return next(iter(self.delays)) or 0 if len(self.delays) == 1 else 0

    @property
    def presented(self) -> list[Run]:
        return [run for run in self.runs if run.packets]

    @property
    def packets(self) -> int:
        return sum(run.packets for run in self.runs)

    @property
    def end(self) -> int:
        """In ticks, after the shifts."""
        return max((run.end + run.shift for run in self.presented), default=0)

    @property
    def leap_s(self) -> Fraction:
        return max((run.leap for run in self.presented), default=0) * self.time_base

    @property
    def restarts(self) -> tuple[Restart, ...]:
        """Empty if the clock runs through."""
        if not any(run.shift for run in self.runs):
            return ()
        return tuple(Restart(run.first_packet, run.shift) for run in self.runs)


@dataclass(frozen=True)
class _Step:
    """The decoding time of a stream steps back, or far forward, between the run before `run` and `run`. In seconds."""

    stream: StreamTimeline
    run: int
    before_s: Fraction
    after_s: Fraction

    @property
    def forward(self) -> bool:
        return self.after_s > self.before_s

    def same_place(self, other: _Step) -> bool:
        return (
            self.forward == other.forward
            and abs(self.before_s - other.before_s) < _TOGETHER_S
            and abs(self.after_s - other.after_s) < _TOGETHER_S
        )


class Timeline:
    """The clocks of the chosen streams of a file.

    streams: kind ("video" or "audio") and time base of each chosen stream, by index. free_running: whether a joined
    film may also step forward. Feed all packets to `add` in the order of the file, then call `finish`.
    """

    def __init__(self, streams: Mapping[int, tuple[str, Fraction]], free_running: bool):
        self.streams = {index: StreamTimeline(time_base, kind) for index, (kind, time_base) in streams.items()}
        self.notes: list[str] = []
        self._free_running = free_running
        self._steps: list[_Step] = []

    @property
    def num_restarts(self) -> int:
        return len(self._steps)

    def add(self, packet: av.Packet) -> None:
        stream = self.streams.get(packet.stream_index)
        if stream is None or not packet.size:
            return
        self._find_step(stream, packet.dts, packet.duration or 0)
        stream.num_packets += 1
        ticks = packet.pts if packet.pts is not None else packet.dts
        if packet.pts is not None and not packet.is_discard:
            stream.repeated += packet.pts in stream.recent
            stream.recent.append(packet.pts)
        if len(stream.delays) < 2:  # two are enough to know that they vary
            stream.delays.add(None if packet.pts is None or packet.dts is None else packet.pts - packet.dts)
        if ticks is not None and not packet.is_discard:  # an edit list or an encoder's priming hides the others
            stream.runs[-1].add(ticks, packet.duration or 0)

    def _find_step(self, stream: StreamTimeline, ticks: int | None, duration: int) -> None:
        if ticks is None:
            return
        before, stream.decoding_ticks = stream.decoding_ticks, ticks
        if before is None:
            return
        step_s = (ticks - before) * stream.time_base
        if not stream.runs[-1].packets:
            return
        if step_s < -_STEP_BACK_S or (self._free_running and step_s - duration * stream.time_base > _STEP_FORWARD_S):
            stream.runs.append(Run(stream.num_packets))
            stream.recent.clear()
            before_s, after_s = before * stream.time_base, ticks * stream.time_base
            self._steps.append(_Step(stream, len(stream.runs) - 1, before_s, after_s))

    def finish(self) -> None:
        """Gives every run its shift, and says in `notes` what was done."""
        for stream in self.streams.values():
            if stream.kind == "video" and stream.repeated:
                self.notes.append(
                    f"{stream.repeated} of its {stream.num_packets} pictures have the time of another and are not shown"
                )
        joints: list[Fraction] = []
        done: set[int] = set()
        for number, step in enumerate(self._steps):
            if number in done:
                continue
            together = [step]
            other = next(
                (i for i, later in enumerate(self._steps) if i > number and later.stream is not step.stream), None
            )
            if other is not None and other not in done and step.same_place(self._steps[other]):
                done.add(other)
                together.append(self._steps[other])
            alone = len(together) < len(self.streams)
            if alone and step.forward:  # the others run on: this is a gap
                run, before = step.stream.runs[step.run], step.stream.runs[step.run - 1]
                run.shift = before.shift
                run.leap = max(run.leap, round((step.after_s - step.before_s) / step.stream.time_base))
                continue
            joints.append(_carry_on(together))
            if alone:
                back_s = float(step.before_s - step.after_s)
                what, others = ("sound", "pictures") if step.stream.kind == "audio" else ("pictures", "sound")
                self.notes.append(
                    f"the clock of its {what} goes back by {back_s:.2f} s at {float(joints[-1]):.2f} s, that of its "
                    f"{others} does not; the {what} may be late from there on"
                )
                joints.pop()
        if joints:
            first = min(run.first * s.time_base for s in self.streams.values() for run in s.presented[:1])
            at = ", ".join(f"{float(joint - first):.2f}" for joint in joints[:5]) + (", ..." if len(joints) > 5 else "")
            self.notes.append(
                f"it is joined from {len(joints) + 1} parts whose clocks start again at {at} s; they follow each other"
            )


def _carry_on(steps: list[_Step]) -> Fraction:
    """Shifts the runs after these steps to the end of the runs before. Returns the time of the joint, in seconds."""
    shift_s = max(
        (s.stream.runs[s.run - 1].shifted_end - s.stream.runs[s.run].first) * s.stream.time_base for s in steps
    )
    for step in steps:
        step.stream.runs[step.run].shift = round(shift_s / step.stream.time_base)
    return min((run.first + run.shift) * s.stream.time_base for s in steps for run in [s.stream.runs[s.run]])


def carried_on(packets: Iterable[av.Packet], restarts: tuple[Restart, ...]) -> Iterator[av.Packet]:
    """The packets of one stream, from its first on, with the times of the timeline."""
    if not restarts:
        yield from packets
        return
    number, shift, later = 0, 0, deque(restarts)
    for packet in packets:
        if packet.size:
            while later and later[0].packet <= number:
                shift = later.popleft().shift
            packet.pts = None if packet.pts is None else packet.pts + shift
            packet.dts = None if packet.dts is None else packet.dts + shift
            number += 1
        yield packet
