#!/usr/bin/env bash
# Guess: a value checked against typing.BinaryIO is judged by what it is: files opened in binary mode pass, always.
# Found: beartype 0.23.1 decides once for each class, by the first object of the class that it sees, whether it has what
#   a binary file needs. io.BufferedReader objects have the attribute `mode` only if open() made them. If the first one
#   was made from a raw stream, every later file of open(..., "rb") is refused. If the first one came from open(), a
#   wrapped stream is let through to `"b" in obj.mode`, and the check itself ends with an AttributeError. So whether a
#   test passes depends on which test ran before it.
# Why it matters here: our tests check annotations with beartype. Folder.open gives both kinds, local files and buffered
#   remote ones, and failed or passed with the order of the tests. It is annotated io.BufferedReader now.
# Exit: 0 as described, 1 if the behaviour changed, 2 if it could not run.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet beartype==0.23.1 || exit 2
printf 'a film\n' > "$folder/file"
verdicts() {
    "$folder/venv/bin/python" - "$folder/file" "$1" <<'PY'
import io
import sys
from typing import BinaryIO

from beartype import beartype
from beartype.roar import BeartypeCallHintViolation


@beartype
def checked(file: BinaryIO) -> None:
    pass


def passes(file) -> str:
    try:
        checked(file)
        return "passes"
    except BeartypeCallHintViolation:
        return "refused"
    except AttributeError:
        return "AttributeError"


opened = open(sys.argv[1], "rb")
wrapped = io.BufferedReader(io.BytesIO(b"a film"))
order = [opened, wrapped] if sys.argv[2] == "opened" else [wrapped, opened]
results = {("opened" if one is opened else "wrapped"): passes(one) for one in order}
print(results["opened"], results["wrapped"])
PY
}
first=$(verdicts opened) || exit 2
second=$(verdicts wrapped) || exit 2
echo "beartype 0.23.1, opened file and wrapped stream: $first if the opened file is seen first, $second if not"
[ "$first" = "passes AttributeError" ] && [ "$second" = "refused refused" ] && exit 0
exit 1
