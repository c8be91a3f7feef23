#!/usr/bin/env bash
# Guess: a Ray Serve application builder whose one parameter is annotated with a pydantic model gets the arguments of the
#   config file as that model, whichever way its module writes annotations: FastAPI, pydantic and typer resolve those that
#   `from __future__ import annotations` turns into text. An annotation that Serve cannot read would be refused.
# Found: Ray 2.60.0 looks at the annotation as it stands. In a module with postponed annotations it is text, so the builder
#   gets the plain dict, without a word: values of a wrong type and unknown names are passed on unchecked, and defaults are
#   missing. In a module without them the same builder gets the model.
# Why it matters here: our modules postpone annotations. The server's builder turns a dict into its settings by itself, so
#   that a misspelt setting in a config file is refused.
# Exit: 0 as described, 1 if the behaviour changed, 2 if it could not run.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet 'ray[serve]==2.60.0' || exit 2
cat > "$folder/plain.py" <<'PY'
from pydantic import BaseModel
from ray import serve


class Settings(BaseModel):
    size: int = 3


@serve.deployment
class Kind:
    def __init__(self, kind):
        self.kind = kind


def build(settings: Settings):
    return Kind.bind(type(settings).__name__)
PY
{ echo "from __future__ import annotations"; cat "$folder/plain.py"; } > "$folder/postponed.py"
# The function that `serve run` and `serve deploy` call with the arguments of a config file; it needs no cluster.
found=$(cd "$folder" && venv/bin/python - 2>/dev/null <<'PY'
import plain, postponed
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

for module in (plain, postponed):
    application = build(module.build, {"size": "many"} if module is postponed else {"size": "4"})
    print(module.__name__, application._bound_deployment.init_args[0], end=" ")
PY
) || exit 2
echo "Ray 2.60.0, what the builder gets: $found"
[ "$found" = "plain Settings postponed dict " ] && exit 0
exit 1
