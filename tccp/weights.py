"""Weights made by others: where from, under which licence, how they are recognised, and where they are on this machine.

None comes with the project. `find` looks for a file, `fetch` brings it, `weights_key` names what is in it.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from tccp import __version__
from tccp.config import storage_root
from tccp.errors import TccpError

PLACE = "TCCP_WEIGHTS"
"""Environment variable: a folder that takes the place of <storage>/weights; what it lacks is absent."""
MIRROR = "TCCP_WEIGHTS_URL"
"""Environment variable: URL of a folder that holds the files under their names, asked in place of their makers."""
_TIMEOUT_S = 60.0  # without a byte
_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class Weight:
    """One file of weights.

    what: in words, as in "no ... weights at". sha256 and size_bytes are those of the published file, None where they
    are not known. also: other names that the file goes by. extra: of this package; its code reads the file. instead:
    what there is for those who cannot have it.
    """

    name: str
    file: str
    what: str
    purpose: str
    url: str
    licence: str
    extra: str
    sha256: str | None = None
    size_bytes: int | None = None
    also: tuple[str, ...] = ()
    instead: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.file, *self.also)


WEIGHTS: dict[str, Weight] = {
    weight.name: weight
    for weight in (
        Weight(
            "mediapipe",
            "face_landmarker.task",
            "face landmark",
            "faces and landmarks, backend mediapipe",
            "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task",
            "Apache-2.0",
            "preprocess",
            "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
            3_758_596,
            instead="in `tccp generate`, take --detector lbp, which needs no download",
        ),
        Weight(
            "fan",
            "2DFAN4-11f355bf06.pth.tar",  # what face-alignment 1.5 reads; earlier ones had a TorchScript zip
            "FAN landmark",
            "landmarks, backend fan",
            "https://www.adrianbulat.com/downloads/python-fan/2DFAN4-11f355bf06.pth.tar",
            "BSD-3-Clause",
            "preprocess",
            "11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
            instead="take the backend mediapipe or lbp",
        ),
        Weight(
            "s3fd",
            "s3fd-619a316812.pth",
            "S3FD face detector",
            "faces, backend fan",
            "https://www.adrianbulat.com/downloads/python-fan/s3fd-619a316812.pth",
            "BSD-3-Clause; training data for research only",
            "preprocess",
            "619a31681264d3f7f7fc7a16a42cbbe8b23f31a256f75a366e5a1bcd59b33543",
            89_843_225,
            also=("s3fd.pth",),
            instead="take the backend mediapipe or lbp",
        ),
        Weight(
            "light-asd",
            "finetuning_TalkSet.model",
            "active speaker (Light-ASD)",
            "who of several people speaks",
            "https://github.com/Junhua-Liao/Light-ASD/raw/ed38c232de5efe0261dbd68627c0ade7cdfe14eb/weight/finetuning_TalkSet.model",
            "MIT; training data for research only",
            "preprocess",
            "efc375833887eefa9d209dc92810e18519b04c3c73ea35a549f2a7f40b7d94d5",
            4_175_289,
            also=("light_asd_finetuning_TalkSet.model",),
        ),
        Weight(
            "silero-vad",
            "silero_vad.onnx",
            "voice activity (Silero VAD)",
            "when somebody speaks",
            "https://github.com/snakers4/silero-vad/raw/v6.2.1/src/silero_vad/data/silero_vad.onnx",
            "MIT",
            "preprocess",
            "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
            2_327_524,
        ),
        Weight(
            "syncnet",
            "syncnet_v2.model",
            "SyncNet",
            "offset and confidence of lips and sound",
            "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
            "MIT; training data for research only",
            "preprocess",
            "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
            54_573_114,
        ),
        Weight(
            "sface",
            "face_recognition_sface_2021dec.onnx",
            "face recognition (SFace)",
            "whether two faces are one person's",
            "https://media.githubusercontent.com/media/opencv/opencv_zoo/47534e27c9851bb1128ccc0102f1145e27f23f98/models/face_recognition_sface/face_recognition_sface_2021dec.onnx",
            "Apache-2.0",
            "preprocess",
            "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
            38_696_353,
        ),
        Weight(
            "wav2lip",
            "wav2lip.pth",
            "Wav2Lip",
            "lip references, lips.source=wav2lip",
            "https://iiitaphyd-my.sharepoint.com/:u:/g/personal/radrabha_m_research_iiit_ac_in/Eb3LEzbfuKlJiR600lQWRxgBIY27JZg80f7V9jtMfbNDaQ?download=1",
            "research and personal use only",
            "train",
            "b78b681b68ad9fe6c6fb1debc6ff43ad05834a8af8a62ffc4167b7b34ef63c37",
            435_807_851,
            instead="set lips.source=liplet, which is trained here",
        ),
    )
}


def entry(which: str | Weight) -> Weight:
    """The table's entry of that name. Raises TccpError that lists the names there are."""
    if isinstance(which, Weight):
        return which
    if which not in WEIGHTS:
        raise TccpError(f"unknown weights {which!r}: choose of {', '.join(WEIGHTS)}")
    return WEIGHTS[which]


def place() -> Path:
    """The folder of weights: TCCP_WEIGHTS, else <storage>/weights."""
    return Path(os.environ.get(PLACE) or storage_root() / "weights").expanduser()


def find(which: str | Weight, given: Path | None = None) -> Path:
    """A file of weights on this machine; nothing is downloaded, and its content is not looked at.

    given: the file, whatever its name, or the folder it is in; by default `place()`.
    Raises TccpError that says where it was looked for, and which command fetches it.
    """
    weight = entry(which)
    candidates = [(given or place()) / name for name in weight.names]
    if given is not None and (given.is_file() or (not given.is_dir() and given.suffix == Path(weight.file).suffix)):
        candidates = [given]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise TccpError(
            f"no {weight.what} weights at {candidates[0]}: fetch them with `tccp weights fetch {weight.name}`, put the "
            f"file there, or name its folder in {PLACE}{f'; or {weight.instead}' if weight.instead else ''}"
        )
    return found


def available(which: str | Weight, given: Path | None = None) -> Path | None:
    """As `find`, but None where there is no such file."""
    weight = entry(which)
    try:
        return find(weight, given)
    except TccpError:
        return None


def weights_key(path: Path) -> str:
    """SHA-256 of a file's content in hex, for hashes of what is made with it. Read once per process and version."""
    stat = path.stat()
    return _digest_of(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _digest_of(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(given: Path | None = None) -> list[dict[str, Any]]:
    """One record per entry of the table: what it says, `path` (None where absent), and `state`.

    state: `verified`, `unverified` (no hash is known), `differs` (not the published file) or `absent`.
    """
    records = []
    for weight in WEIGHTS.values():
        path = available(weight, given)
        record = {key: getattr(weight, key) for key in ("name", "file", "purpose", "licence", "extra", "url", "sha256")}
        record |= {"size_bytes": weight.size_bytes, "path": None if path is None else str(path), "state": "absent"}
        if path is not None:
            same = weights_key(path) == weight.sha256
            record["state"] = "unverified" if weight.sha256 is None else "verified" if same else "differs"
        records.append(record)
    return records


def text_table(records: list[dict[str, Any]]) -> str:
    """The records of `listing`, a line each."""
    lines = []
    for record in records:
        size = "?" if record["size_bytes"] is None else f"{record['size_bytes'] / 1e6:.1f}"
        about = f"{record['purpose']} ({record['licence']})"
        lines.append(f"{record['name']:10}  {record['state']:10}  {size:>5} MB  {record['path'] or about}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Fetched:
    """A file that is in place. verified: its SHA-256 is the published one, rather than one that nobody vouches for."""

    name: str
    path: Path
    sha256: str
    verified: bool
    downloaded: bool

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        doubt = "" if self.verified else f"; NOT verified: no hash of it is known, this one's SHA-256 is {self.sha256}"
        return f"{self.name}: {self.path}{'' if self.downloaded else ' (was there)'}{doubt}"


def fetch(which: str | Weight, url: str | None = None, to: Path | None = None) -> Fetched:
    """Download a file of weights, unless it is there. It gets its name only when whole and, by its hash, the right one.

    url: of the file (http, https or file), in place of the published one; by default it is looked for in the folder
    that TCCP_WEIGHTS_URL names, where set. to: folder; by default `place()`.
    What has come of an interrupted download is kept under a name of its own, to go on from, where the hash can vouch
    for the whole. Raises TccpError; then nothing is at the file's place that was not there before.
    """
    weight = entry(which)
    folder = place() if to is None else to
    present = next((folder / name for name in weight.names if (folder / name).is_file()), None)
    if present is not None:
        digest = weights_key(present)
        if weight.sha256 not in (None, digest):
            raise TccpError(
                f"{present} is there, but is not the published file (its SHA-256 is {digest}, not {weight.sha256}): "
                "remove it to fetch that one"
            )
        return Fetched(weight.name, present, digest, weight.sha256 is not None, downloaded=False)
    target = folder / weight.file
    source = url or _source(weight)
    with _partial(target) as part:
        _receive(weight, source, part)
        part.seek(0)
        digest = hashlib.file_digest(part, "sha256").hexdigest()
        if weight.sha256 not in (None, digest):
            _emptied(part)
            raise TccpError(
                f"{weight.name} from {source} is not the published file: its SHA-256 is {digest}, not {weight.sha256}; "
                "nothing was kept, try another source with --url"
            )
        os.fsync(part.fileno())
        os.replace(part.name, target)
    return Fetched(weight.name, target, digest, weight.sha256 is not None, downloaded=True)


def _source(weight: Weight) -> str:
    mirror = os.environ.get(MIRROR)
    return f"{mirror.rstrip('/')}/{weight.file}" if mirror else weight.url


@contextmanager
def _partial(target: Path) -> Iterator[BufferedRandom]:
    """The file that is to become `target`, open, with what an earlier try has left in it; removed where empty."""
    path = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TccpError(f"{target} is being fetched by another process: wait for that one") from None
            try:
                yield part
            finally:
                part.flush()
                if path.exists() and path.stat().st_size == 0:
                    path.unlink()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room" if full else "choose a folder that can be written, with --to"
        raise TccpError(f"cannot write {target}: {error.strerror}; {advice}") from None


def _receive(weight: Weight, url: str, part: BufferedRandom) -> None:
    """Append to `part` what it lacks of the file. Raises TccpError unless it then has as many bytes as it should."""
    from tccp.progress import progress

    start = part.seek(0, os.SEEK_END)
    if weight.sha256 is None or start > (weight.size_bytes or start):
        start = _emptied(part)
    if start and start == weight.size_bytes:
        return
    response, offset = _opened(url, start)
    with response, progress() as bar:
        if offset < start:
            start = _emptied(part)
        length = response.headers.get("Content-Length")
        total = weight.size_bytes if length is None else start + int(length)
        if weight.size_bytes not in (None, total):
            raise TccpError(
                f"{url} offers {total} bytes, but {weight.file} has {weight.size_bytes}: it is not that file; open the "
                "address in a browser, or give another with --url"
            )
        # In megabytes: the bar shows whole numbers.
        task = bar.add_task(f"{weight.name}, MB", total=None if total is None else total / 1e6)
        done = start
        for block in _blocks(response, url):
            part.write(block)
            done += len(block)
            bar.update(task, completed=done / 1e6)
            if done > (total or done):
                _emptied(part)
                raise TccpError(f"{url} sends more than the {total} bytes of {weight.file}: it is not that file")
    if done < (total or 1):
        if weight.sha256 is None:
            _emptied(part)
        raise TccpError(f"{url} broke off after {done} of {total or '?'} bytes: run the command again to go on")


def _emptied(part: BufferedRandom) -> int:
    part.seek(0)
    part.truncate()
    return 0


def _opened(url: str, start: int) -> tuple[Any, int]:
    """An open response and the offset of its first byte: `start`, or 0 from a server that sends files whole only."""
    if not re.match(r"(https?|file)://", url):
        raise TccpError(f"{url!r} is no address of weights: give one that begins with http://, https:// or file://")
    # Some servers turn away what calls itself Python.
    headers = {"User-Agent": f"tccp/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return _opened(url, 0)
        raise TccpError(f"{url}: {error.code} {error.reason}; try another source with --url, or {MIRROR}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", error)).splitlines() or [type(error).__name__]
        raise TccpError(
            f"{url}: {reason[0]}; is there a network? Without one, copy the file there by hand, or give --url file://..."
        ) from None
    partial = str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-")
    return response, start if start and response.status == http.client.PARTIAL_CONTENT and partial else 0


def _blocks(response: Any, url: str) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(_BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise TccpError(f"{url} broke off ({error}): run the command again to go on") from None
        if not block:
            return
        yield block
