"""The command line that the training jobs share."""

from __future__ import annotations

import functools
import inspect
import json as json_format
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tyro
from tyro.conf import Positional, arg

from tccp.cli import one_line_errors
from tccp.cli.options import Json, Preset, emit, note
from tccp.config import FPS, DeepSpeedSettings, Settings, VariantName, load_settings, storage_root
from tccp.errors import TccpError
from tccp.files import Folder, is_url
from tccp.models.variants import FIRST_OF, VARIANTS, variant
from tccp.progress import progress

Stage = Literal["autoencoder", "stage1", "stage2"]
DEFAULT: dict[Stage, tuple[str, ...]] = {
    "autoencoder": ("autoencoder",),
    "stage1": ("landmark_first", "landmark_sequence"),
    "stage2": ("face_first", "face_sequence"),
}

Overrides = Positional[
    Annotated[
        tuple[str, ...],
        arg(metavar="KEY=VALUE", help="settings to change, e.g. training.learning_rate=1e-4 picture_px=128"),
    ]
]


def train(
    stage: Stage,
    overrides: Overrides = (),
    /,
    preset: Preset = "toy",
    max_steps: int | None = None,
    data: str | None = None,
    stream: tuple[str, ...] = (),
    backend: Literal["mediapipe", "fan", "truth"] = "mediapipe",
    storage: str | None = None,
    name: str | None = None,
    resume: bool = False,
    variants: tuple[str, ...] = (),
    stage1: str | None = None,
    autoencoder: str | None = None,
    control_from: str | None = None,
    lip_weights: Path | None = None,
    workers: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    zero_stage: Literal[0, 1, 2, 3] | None = None,
    offload: Literal["none", "optimizer", "parameters"] = "none",
    deepspeed: Path | None = None,
    latents: Literal["ahead", "in-step"] = "ahead",
    readers: int | None = None,
    compile: bool = False,
    max_failures: int = 8,
    timeout_s: float = 1800.0,
    keep: int = 2,
    keep_best: bool = False,
    validate_every: int = 1000,
    mlflow: str | None = None,
    register: str | None = None,
    json: Json = False,
) -> None:
    """Train on a Ray cluster: that of RAY_ADDRESS or of the job, else one on this machine for as long as it takes.

    Without arguments: RoundTable's drawn conversations, with the preset toy. What is lacking is trained first.

    Args:
        max_steps: optimiser steps of each network, in place of the preset's.
        data: clip table, a folder or URL (default: RoundTable, drawn into the storage).
        stream: films (files, folders, patterns, manifests, URLs) to train on straight away, in place of a clip table:
            preprocessed on the cluster's CPUs while training goes on, anew in each epoch, and not kept.
        backend: with --stream, where landmarks come from, as for `tccp preprocess`.
        storage: folder or URL for everything that is kept; on several machines a URL, or file:///... for a folder that
            all of them share (default: TCCP_STORAGE, else ~/.tccp).
        name: of the run, a folder in STORAGE/runs (default: the job's name and the preset's).
        resume: go on with a run that was interrupted, from its last checkpoint.
        variants: networks to train, in place of the stage's two; one_stage_first and one_stage_sequence are known too.
        stage1: a run in the storage, or a pipeline folder or URL, whose stage 1 is taken over, auto-encoder and lips
            with it (default: the packaged toy weights, if the settings fit them).
        autoencoder: likewise, for the auto-encoder and the lips alone; or a diffusers AutoencoderKL folder.
        control_from: a pipeline whose video branches are taken over; with training.freeze_video_branch=true only the
            control branches are trained.
        lip_weights: the published Wav2Lip checkpoint, for lips.source=wav2lip.
        workers: training workers (default: one for each GPU; without GPUs two, or one on a single CPU).
        device: auto takes GPUs where there are any.
        zero_stage: what DeepSpeed divides among workers: nothing, the optimiser's state, gradients too, parameters too
            (default: that of the run that is resumed; else 1, or 0 for a single worker, or what --offload needs).
        offload: what DeepSpeed keeps in the CPU's memory.
        deepspeed: a JSON file of DeepSpeed settings, laid over those derived.
        latents: ahead: all clips are encoded before training, and kept in the storage; in-step: by the workers.
        readers: Ray Data workers that read for each training worker; fewer if the cluster, when training starts, has
            CPUs for fewer.
        compile: let torch.compile translate the networks; takes minutes at the start.
        max_failures: how often workers may die, other than with a machine that is taken away, before it is given up.
        timeout_s: longest that workers wait for each other.
        keep: checkpoints kept of each network.
        keep_best: keep those that did best in validation, beside the newest.
        validate_every: steps between looks at what a network can do, on RoundTable clips that are the same every time:
            figures and a film, in MLflow. At the end, too; taken at the next checkpoint. 0: never.
        mlflow: address of an MLflow server, or none (default: a database in the storage, on one machine).
        register: name under which the pipeline is registered with MLflow at the end, with the alias `newest`.
    """
    from tccp.inference.pipeline import TOY_WEIGHTS
    from tccp.training.launcher.launch import launch
    from tccp.training.launcher.request import Request

    if stream and data is not None:
        raise TccpError("--stream and --data: give one of them")
    settings = _settings(preset, overrides, max_steps)
    kept = storage or os.environ.get("TCCP_STORAGE")
    place = Folder(kept if kept and is_url(kept) else storage_root(kept).absolute())
    take = {"stage1": stage1, "autoencoder": autoencoder}
    pretrained = None
    if autoencoder is not None and (Path(autoencoder) / "config.json").is_file():
        pretrained = Path(take.pop("autoencoder") or "")
    components = tuple(variants) or DEFAULT[stage]
    for one in variants:
        variant(one)
    request = Request(
        components=components,
        settings=settings,
        table=None if stream else partial(_roundtable, settings, place) if data is None else lambda: data,
        films=_films(stream, backend, settings) if stream else None,
        storage=place,
        name=name or f"{stage}-{preset}",
        resume=resume,
        workers=workers,
        device=device,
        parallel=_parallel(zero_stage, offload, deepspeed),
        latents=latents,
        readers=readers,
        compiled=compile,
        timeout_s=timeout_s,
        max_failures=max_failures,
        keep=keep,
        keep_best=keep_best,
        validate_every=validate_every,
        reuse_from=(Folder(TOY_WEIGHTS),),
        require_from=tuple(_pipeline(place, given) for given in take.values() if given is not None),
        control_from=None if control_from is None else _pipeline(place, control_from),
        pretrained_autoencoder=pretrained,
        lip_weights=lip_weights,
        tracking=mlflow,
        register_as=register,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    done = launch(request, validate, note)
    record = {"pipeline": done.pipeline, "trained": done.trained, "taken": done.reused, "workers": done.workers}
    trained = ", ".join(done.trained) or "nothing: all is there"
    emit(json, record, f"trained {trained}; pipeline: {done.pipeline}")


VALIDATION_CLIPS = 4


def validate(job: Any, step: int, network: Any, folder: Path) -> dict[str, float]:
    """`tccp.training.launcher.rank.Validate`; imports are inside, for it travels to where nothing is measured."""
    from tccp.evaluation.validation import validate_network, validation_clips, with_network
    from tccp.inference.pipeline import has_component

    with job.pipeline.as_local() as place:
        if job.component in FIRST_OF and not has_component(place, FIRST_OF[job.component]):
            return {}  # it continues from frames of a network that is not there yet
        pipeline = with_network(place, job.component, network, "cuda" if job.allocation.use_gpu else "cpu")
        return validate_network(pipeline, job.component, validation_clips(job.settings, VALIDATION_CLIPS), folder)


def _settings(preset: str, overrides: Sequence[str], max_steps: int | None) -> Settings:
    given = list(overrides)
    if max_steps is not None:
        given += [f"training.max_steps={max_steps}", f"autoencoder.max_steps={max_steps}"]
    return load_settings(preset, given)


def _parallel(zero_stage: int | None, offload: str, config: Path | None) -> DeepSpeedSettings:
    values: dict[str, Any] = {"zero_stage": zero_stage, "offload": offload}
    if config is not None:
        try:
            values["config"] = json_format.loads(config.read_text())
        except (OSError, ValueError) as error:
            raise TccpError(f"--deepspeed {config}: {error}; give a file of DeepSpeed settings as JSON") from None
    try:
        return DeepSpeedSettings(**values)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise TccpError(f"--zero-stage {zero_stage} --offload {offload}: {reason}") from None


def _pipeline(storage: Folder, given: str) -> Folder:
    """The pipeline of a run in the storage, or a pipeline folder. Raises TccpError if it is neither."""
    run = Folder(storage.path(f"runs/{given}/pipeline"))
    folder = run if "/" not in given and run.exists("manifest.json") else Folder(given)
    if not folder.exists("manifest.json"):
        raise TccpError(f"{given} is neither a run in {storage} nor a pipeline folder with manifest.json")
    return folder


def _films(sources: Sequence[str], backend: str, settings: Settings) -> Callable[[VariantName, Path, float], Any]:
    """Windows straight from film, for the launcher. Raises TccpError for sources that are not there."""
    from preprocessing.graph import film_windows
    from preprocessing.lip_step import lip_work
    from preprocessing.plan import make_plan
    from preprocessing.sources.listing import list_sources

    listing, plan = list_sources(list(sources)), make_plan(settings.picture_px, backend, None)

    def windows_of(name: VariantName, pipeline: Path, held: float) -> Any:
        row = VARIANTS[name]
        shown = "lips" in row.conditions_with(settings.lips.source)
        lips = lip_work(settings.lips, pipeline / "lips") if shown else None
        window = row.num_frames(settings.window)
        return partial(film_windows, listing=listing, plan=plan, settings=settings, window=window, lips=lips, held=held)

    return windows_of


FILMS, SECONDS, SEED = 72, 3.0, 1
"""RoundTable films that jobs train on where they are given no footage."""


def _roundtable(settings: Settings, storage: Folder) -> str:
    """RoundTable's clip table in a storage, drawn and preprocessed if it is not there. Ray must be running."""
    from preprocessing.plan import make_plan
    from preprocessing.run import preprocess
    from tccp.clips.clip_table import INDEX
    from tccp.roundtable import write_clips

    films, table = Folder(storage.path("roundtable/films")), storage.path(f"roundtable/clips-{settings.picture_px}")
    if Folder(table).exists(INDEX):
        return table
    if sum(name.endswith(".mp4") for name in films.names()) < FILMS:
        with tempfile.TemporaryDirectory(prefix="tccp-films-") as place, progress() as bar:
            task = bar.add_task("drawing scenes", total=FILMS * round(SECONDS * FPS))
            write_clips(place, FILMS, SECONDS, SEED, progress=lambda name, done, total: bar.advance(task))
            films.upload(Path(place), "")
    preprocess([str(films)], table, make_plan(settings.picture_px, "truth"), on_ray=True)
    return table


def run(stage: Stage, argv: Sequence[str] | None = None) -> None:
    """The entry point of a job."""
    warnings.simplefilter("ignore", FutureWarning)
    with one_line_errors():
        tyro.cli(_of(stage), prog=f"train_{stage}.py", args=argv)


def _of(stage: Stage) -> Callable[..., None]:
    """`train` without its first argument, for the command line."""

    @functools.wraps(train)
    def job(*arguments: Any, **options: Any) -> None:
        train(stage, *arguments, **options)

    whole = inspect.signature(train, eval_str=True)
    job.__signature__ = whole.replace(parameters=list(whole.parameters.values())[1:])  # type: ignore[attr-defined]
    del job.__wrapped__
    job.__annotations__ = {name: one.annotation for name, one in list(whole.parameters.items())[1:]} | {"return": None}
    return job
