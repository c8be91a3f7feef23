"""What clients are told of errors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tccp.errors import TccpError
from tccp.files import Folder
from tccp.media import MediaError
from tccp.serving.errors_for_clients import Refused, code_of, message_for_client, refused


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/srv/data/jobs/video_1/inputs/scene: no pictures", "scene: no pictures"),
        ("no weights at /var/lib/tccp/weights/face.task, see https://example.org/a/b", None),
        ("extend the scene with --extend freeze, or give --identity-box whole", None),
    ],
)
def test_messages_name_no_folder_of_the_server_and_the_fields_of_the_api(given: str, told: str | None) -> None:
    text = message_for_client(TccpError(given), Folder("/srv/data"))
    expected = {
        "no weights": "no weights at face.task, see https://example.org/a/b",
        "extend the": "extend the scene with extend freeze, or give identity_box whole",
    }
    assert text == (told or expected[given[:10]])


def test_a_refusal_keeps_its_code_between_processes() -> None:
    with pytest.raises(Refused) as caught, refused(Folder("/srv")):
        raise MediaError(Path("/srv/jobs/a/inputs/audio"), "no_audio", "the file has no sound")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (code_of(again), str(again)) == ("no_audio", "audio: the file has no sound")
