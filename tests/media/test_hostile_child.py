"""A hostile child can make one film fail, in time; it cannot end, hang or fill the parent. `make soak` has 10,000."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from descriptors import open_descriptors
from hostility import Outcome, face, hostile_children

from tccp.media.sandbox import Decoder
from tccp.media.sandbox.channel import Channel
from tccp.media.sandbox.messages import check_packet, parse_answer
from tccp.roundtable import write_clips


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("film"), 1, 0.8, seed=9, width=128, height=96)[0]


def test_each_malformed_message_ends_in_one_media_error(film: Path, tmp_path: Path) -> None:
    outcome = Outcome()
    with hostile_children(tmp_path, film) as choose:
        before = None
        for number in range(72):
            choose(number)
            face(number, film, outcome)
            before = before or len(open_descriptors())
    assert outcome.accepted == [] and outcome.reasons.total() == 72
    assert set(outcome.reasons) <= {"decoder_crashed", "too_slow", "corrupt"}
    assert outcome.longest_s < 30 and len(open_descriptors()) == before


def test_descriptors_from_the_child_are_closed_and_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        before = open_descriptors()
        for count in (1, 2, 100):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * count))]
            theirs.sendmsg([b'{"kind": "end", "id": 1}'], rights)
            with pytest.raises(ValueError, match="with descriptors"):
                Channel(ours).receive(parse_answer, 1.0)
            assert open_descriptors() == before
        theirs.send(b'{"kind": "end", "id": 1}')
        assert Channel(ours).receive(parse_answer, 1.0).id == 1


@pytest.mark.parametrize(
    "packet",
    [
        b'{"kind": "end", "id": 1, "notes": ' + b"[" * 9 + b"]" * 9 + b"}",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b'{"kind": "end", "id": 1}' + b" " * (1 << 16),
    ],
)
def test_size_and_nesting_are_bounded_before_parsing(packet: bytes) -> None:
    with pytest.raises(ValueError, match=r"^(nested too deeply|too long)$"):
        check_packet(packet)
    check_packet(json.dumps({"kind": "failure", "id": 1, "problem": '[[[[[[[[[[ \\" {{{{{{{{{{'}).encode())


REACH = """
import json, os, signal, socket, sys, threading
from tccp.media.sandbox.confinement import confine

kept = open("/etc/hostname", "rb")
parent = os.getppid()
why = confine()
done = {}

def attempt(name, call):
    try:
        call()
        done[name] = True
    except OSError:
        done[name] = False

attempt("open a file", lambda: os.open("/etc/passwd", os.O_RDONLY))
attempt("open what is open", lambda: os.open("/proc/self/fd/0", os.O_RDONLY))
attempt("write a file", lambda: os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT))
attempt("ask about a file", lambda: os.stat("/etc/passwd"))
attempt("list a folder", lambda: os.listdir("/"))
attempt("rename", lambda: os.rename(sys.argv[1], sys.argv[1] + "2"))
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
    attempt(f"socket {family.name}", lambda: socket.socket(family, socket.SOCK_DGRAM))
attempt("socketpair", socket.socketpair)
attempt("fork", os.fork)
attempt("execute", lambda: os.execv("/bin/true", ["true"]))
attempt("signal the parent", lambda: os.kill(parent, 0))
attempt("memory file", lambda: os.memfd_create("x"))
attempt("in a thread", lambda: None)
thread = threading.Thread(target=lambda: attempt("open in a thread", lambda: os.open("/etc/passwd", os.O_RDONLY)))
thread.start()
thread.join()
attempt("read what is open", lambda: os.pread(kept.fileno(), 1, 0))
print(json.dumps([why, done]))
"""


def test_a_confined_process_reaches_nothing_but_what_it_has_open(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", REACH, str(tmp_path / "written")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    why, reached = json.loads(done.stdout)
    assert why is None
    assert {name for name, success in reached.items() if success} == {"in a thread", "read what is open"}
    assert len(reached) == 18 and not list(tmp_path.iterdir())


def test_the_child_is_confined(film: Path) -> None:
    with Decoder() as decoder:
        assert decoder.unconfined() is None
        next(decoder.frames(film))
        assert decoder._process is not None
        seen = []
        for task in Path(f"/proc/{decoder._process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread of FFmpeg may end meanwhile
                seen.append((task / "status").read_text())
        assert seen and all("Seccomp:\t2" in status for status in seen)  # 2: a filter
