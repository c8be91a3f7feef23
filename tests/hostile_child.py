"""A child process that answers with malformed messages, in the place of the sandbox's own. It does no harm.

It runs by itself and imports only the standard library: `hostile_child.py -m MODULE SOCKET PARENT SIGNALLED`. The
variable PYTHON_HOSTILE holds the number of its message, which is made from this number alone.
"""

import array
import contextlib
import json
import os
import random
import socket
import sys
import time

FREE = {"seeks", "transpose", "mirror_x", "mirror_y", "profile_ignored", "frame_rate", "notes", "reason", "problem"}
FREE |= {"video_codec", "audio_codec", "audio_layout", "layout"}
HUGE = (-1, -(1 << 63), 1 << 31, 1 << 63, 1 << 64, 1 << 400, -(1 << 4000))
SPANS = ("1/0", "9" * 40, "-" + "9" * 40, "1e999999999", "0x10", "1/" + "9" * 39, "9" * 200, "", " 1", "nan", "½")
WRONG = (None, True, [], {}, "", "x", "\0", 1.5, -0.0, [[]], {"start": 0}, "\ud800", "\x1b[2J", float("nan"), 1e308)


def answers(request: dict, info: dict) -> list[dict]:
    """Well-formed answers of every kind to a request."""
    head = {"id": request["id"]}
    return [
        info | head,
        {"kind": "block", "slot": 0, "num_bytes": 128 * 96 * 3} | head,
        {"kind": "end", "notes": ["x"]} | head,
        {"kind": "failure", "reason": "corrupt", "problem": "it is damaged"} | head,
        {"kind": "sound_format", "sample_rate_hz": 48000, "num_channels": 2, "layout": "stereo"} | head,
        {"kind": "picture", "width": 4, "height": 4, "num_pictures": 1, "profile_ignored": False} | head,
    ]


def right_answer(request: dict, info: dict) -> dict | None:
    """The answer that the real child would begin with; None if that is a block."""
    media, _, _, _, sound, picture = answers(request, info)
    return {"probe": media, "film_sound": sound, "picture": picture}.get(request["kind"])


def malformed(chance: random.Random, request: dict, info: dict) -> list[bytes]:
    """Packets of which at least the last is no answer that the parent may accept."""
    right = right_answer(request, info)
    one = right if right is not None and chance.random() < 0.7 else chance.choice(answers(request, info))
    text = json.dumps(one).encode()
    name = chance.choice(list(one))
    wrong = {"start": 0} if name in FREE else chance.choice(WRONG)  # in the former, some of the others are right
    match chance.randrange(12):
        case 0:
            return [json.dumps(one | {name: wrong}).encode()]
        case 1:
            return [json.dumps(one | {name: chance.choice(HUGE)}).encode()]
        case 2:  # deep
            depth = chance.choice((9, 100, 10_000, 60_000))
            opened, closed = chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
            return [text[:-1] + b', "notes": ' + (opened * depth)[:60_000] + (closed * depth)[:60_000] + b"}"]
        case 3:  # of another request
            other = chance.choice((one["id"] + 1, one["id"] + 1000, 1 << 62, -1))
            return [json.dumps(one | {"id": other}).encode()]
        case 4:  # of earlier requests, without end
            return [json.dumps(one | {"id": 0}).encode()] * 5000
        case 5:  # slots and sizes
            slot = chance.choice((32, 4, 1023, 1024, -1, 1 << 40))
            size = chance.choice((0, -1, 1, 128 * 96 * 3 + 1, 1 << 40, (1 << 63) - 1))
            block = {"kind": "block", "id": request["id"]}
            place = chance.choice(({"slot": 0, "num_bytes": size}, {"slot": slot, "num_bytes": 1}))
            return [json.dumps(block | place).encode()]
        case 6:  # spans
            track = chance.choice(("video_span", "audio_span"))
            span = {"start": "0", "end": "1"} | {chance.choice(("start", "end")): chance.choice(SPANS)}
            return [json.dumps(info | {"id": request["id"], track: chance.choice((span, None, [0, 1]))}).encode()]
        case 7:  # too long
            return [text[:-1] + b" " * chance.choice((70_000, 140_000)) + b"}"]
        case 8:  # cut
            return [text[: chance.randrange(1, len(text))]]
        case 9:  # no text at all
            return [chance.randbytes(chance.randrange(1, 300))]
        case 10:  # duplicate and unknown names
            return [text[:-1] + chance.choice((b', "id": 0}', b', "unknown": 1}', b', "kind": "free"}', b"}}", b",}"))]
        case _:  # a number that is written at length
            return [text[:-1] + b', "num_bytes": ' + b"9" * chance.choice((30, 5000, 60_000)) + b"}"]


def main() -> None:
    number = int(os.environ["PYTHON_HOSTILE"])
    chance = random.Random(number)
    info = json.loads(os.environ["PYTHON_HOSTILE_INFO"])
    end = socket.socket(fileno=int(sys.argv[3]))
    end.recv(1 << 17)
    end.send(json.dumps({"kind": "ready", "unconfined": None}).encode())
    late = chance.random() < 0.6  # the first answer is right
    while packet := end.recv(1 << 17):
        request = json.loads(packet)
        if request["kind"] in ("free", "stop"):
            continue
        right = right_answer(request, info)
        if late and right is not None:
            end.send(json.dumps(right).encode())
            late = False
            if request["kind"] != "film_sound":
                continue
        end.settimeout(5)
        if number % 50 == 0:
            time.sleep(30)  # silence: the parent ends this process
        if number % 10 == 1:  # with descriptors, of files that this process has open
            mine = array.array("i", [0] * chance.choice((1, 2, 50)))
            right = right or {"kind": "end", "notes": [], "id": request["id"]}
            end.sendmsg([json.dumps(right).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, mine)])
        elif number % 10 != 2:  # else it only closes the connection
            for bad in malformed(chance, request, info):
                end.send(bad)
        return


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # the parent has had enough
        main()
