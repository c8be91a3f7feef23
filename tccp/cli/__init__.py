"""`tccp <verb>`: the commands. The verbs import heavy modules in their bodies, so that `tccp --help` starts fast."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import tyro

from tccp.cli.footage import inspect, preprocess, synth, weights
from tccp.cli.generating import demo, doctor, films, generate
from tccp.cli.networks import describe, evaluate, export, train
from tccp.cli.options import deferred, note
from tccp.cli.serving import cancel, fetch, serve, submit, watch
from tccp.errors import StorageError, TccpError
from tccp.files import is_storage_failure

VERBS: dict[str, Callable[..., None]] = {
    "synth": synth,
    "weights": weights,
    "preprocess": preprocess,
    "inspect": inspect,
    "train": train,
    "export": export,
    "generate": generate,
    "films": films,
    "serve": serve,
    "submit": submit,
    "watch": watch,
    "fetch": fetch,
    "cancel": cancel,
    "evaluate": evaluate,
    "describe": describe,
    "doctor": doctor,
    "demo": demo,
}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """One line on stderr for every error of `tccp.errors`, with its exit code; a bug keeps its traceback.

    Exit code 2: a user's mistake, or damaged data. 3: storage or network failed after all retries. 130: interrupted.
    """
    try:
        yield
    except (TccpError, StorageError) as error:
        note(f"error: {' '.join(str(error).split())}")
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if is_storage_failure(error):
            text = f"{error.filename or 'storage'}: {error.strerror or error}"
            note(f"error: {text}; check the disk or network, then try again")
            raise SystemExit(StorageError.exit_code) from None
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
