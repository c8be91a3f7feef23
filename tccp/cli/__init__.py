"""`tccp <verb>`: the commands. Heavy imports stay inside the verbs, so that `tccp --help` answers at once."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import tyro

from tccp.cli.footage import inspect, preprocess, synth, weights
from tccp.cli.generate import demo, doctor, generate
from tccp.cli.networks import describe, evaluate, export, train
from tccp.cli.options import note
from tccp.errors import TccpError

VERBS: dict[str, Callable[..., None]] = {
    "synth": synth,
    "weights": weights,
    "preprocess": preprocess,
    "inspect": inspect,
    "train": train,
    "export": export,
    "generate": generate,
    "evaluate": evaluate,
    "describe": describe,
    "doctor": doctor,
    "demo": demo,
}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake ends in one line on stderr and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except TccpError as error:
        note(f"error: {' '.join(str(error).split())}")
        raise SystemExit(2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None:
            raise
        note(f"error: {error.filename}: {error.strerror}; check the path and its permissions")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        note("interrupted")
        raise SystemExit(130) from None


def main(argv: Sequence[str] | None = None) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of other packages; no news to a user
    from tccp.cli.progress_display import shown_on_stderr

    with one_line_errors(), shown_on_stderr():
        tyro.extras.subcommand_cli_from_dict(
            VERBS, prog="tccp", description="Talking heads, generated into scenes from sound.", args=argv
        )
