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


def main(argv: Sequence[str] | None = None) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of other packages; no news to a user
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            VERBS, prog="tccp", description="Talking heads, generated into scenes from sound.", args=argv
        )
