"""`tccp <verb>`: the commands. The verbs import heavy modules in their bodies, so that `tccp --help` starts fast."""

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
from tccp.cli.options import deferred, note
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
    """Turns a user's mistake into one line on stderr and exit code 2. A bug keeps its traceback."""
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


def parse(argv: Sequence[str] | None = None) -> Callable[[], None]:
    """Parses a command line (default: sys.argv) and returns the call that it asks for, without making it.

    Raises SystemExit: code 2 for wrong usage, 0 after --help.
    """
    verbs = {name: deferred(verb) for name, verb in VERBS.items()}
    description = "Generates talking heads into films, from sound and a picture of a person."
    call: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
        verbs, prog="tccp", description=description, args=argv
    )
    return call


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line (default: sys.argv)."""
    warnings.simplefilter("ignore", FutureWarning)  # from other packages; users cannot act on them
    from tccp.cli.progress_display import shown_on_stderr

    with one_line_errors(), shown_on_stderr():
        parse(argv)()
