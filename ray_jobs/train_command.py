"""The command line of the training jobs: train_autoencoder.py, train_stage1.py and train_stage2.py."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pydantic
import tyro

from tccp.cli import one_line_errors
from tccp.cli.options import (
    Backend,
    Json,
    LipWeights,
    MaxSteps,
    Overrides,
    Preset,
    Resume,
    deferred,
    emit,
    note,
    settings_of,
)
from tccp.config import FPS, DeepSpeedSettings, Settings, VariantName, storage_root
from tccp.errors import TccpError
from tccp.files import Folder, check_outputs, is_url
from tccp.models.variants import FIRST_OF, VARIANTS, variant
from tccp.progress import progress
from tccp.strict_json import parse_json

Stage = Literal["autoencoder", "stage1", "stage2"]
DEFAULT: dict[Stage, tuple[str, ...]] = {
    "autoencoder": ("autoencoder",),
    "stage1": ("landmark_first", "landmark_sequence"),
    "stage2": ("face_first", "face_sequence"),
}


def train(
    stage: Stage,
    /,
    preset: Preset = "toy",
    set: Overrides = (),
    max_steps: MaxSteps = None,
    data: str | None = None,
    stream: tuple[str, ...] = (),
    backend: Backend = "mediapipe",
    storage: str | None = None,
    name: str | None = None,
    resume: Resume = False,
    variants: tuple[str, ...] = (),
    stage1: str | None = None,
    autoencoder: str | None = None,
    control_from: str | None = None,
    lip_weights: LipWeights = None,
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
    """Train networks on a Ray cluster: the one that RAY_ADDRESS names, or the one that the job runs on. Without either,
    the command starts Ray on this machine and stops it at the end.

    Without options it trains on RoundTable's drawn conversations with the preset toy. Missing components that a network
    depends on are trained first.

    Args:
        data: clip table, a folder or URL (default: RoundTable, drawn into the storage).
        stream: films to train on directly, instead of a clip table: files, folders, patterns, manifests or URLs. The
            cluster's CPUs preprocess them during training, again in each epoch; the clips are not stored.
        storage: folder or URL for all results. On several machines, give a URL, or file:///... for a folder that all
            of them share (default: TCCP_STORAGE, else ~/.tccp).
        name: name of the run, a folder in STORAGE/runs (default: the job's name and the preset's).
        variants: networks to train instead of the job's two; one_stage_first and one_stage_sequence are also possible.
        stage1: where to take stage 1, the auto-encoder and the lips from: a run in the storage, or a pipeline folder or
            URL (default: the packaged toy weights, if the settings fit them).
        autoencoder: where to take the auto-encoder and the lips from: as for --stage1, or a diffusers AutoencoderKL
            folder.
        control_from: run, or pipeline folder or URL, to copy the video branches from. With --set
            training.freeze_video_branch=true only the control branches are trained.
        workers: training workers (default: one for each GPU; without GPUs two, or one on a single CPU).
        device: auto uses GPUs if there are any.
        zero_stage: what DeepSpeed's ZeRO divides among workers: 0 nothing, 1 optimiser state, 2 gradients too, 3
            parameters too (default: the stage of the run that is resumed; else 1, or 0 for a single worker, or the
            stage that --offload needs).
        offload: what DeepSpeed keeps in the CPU's memory.
        deepspeed: JSON file of DeepSpeed settings. They replace the derived ones.
        latents: ahead: encode all clips before training and store the latents; in-step: the training workers encode.
        readers: Ray Data workers that read for each training worker. If the cluster has CPUs for fewer when training
            starts, fewer are used.
        compile: compile the networks with torch.compile, which takes minutes at the start.
        max_failures: number of worker failures after which training stops. Machines that are taken away with notice do
            not count.
        timeout_s: longest time that workers wait for each other, in seconds.
        keep: number of checkpoints to keep of each network.
        keep_best: also keep the checkpoints with the best validation score.
        validate_every: steps between validations, which take place at the next checkpoint and at the end. Validation
            generates fixed RoundTable clips and logs metrics and a film to MLflow. 0: never.
        mlflow: address of an MLflow server, or none (default: a database in the storage, on one machine).
        register: name to register the pipeline under in MLflow at the end, with the alias `newest`.
    """
    from tccp.inference.manifest import TOY_WEIGHTS
    from tccp.training.launcher.launch import launch
    from tccp.training.launcher.request import Request

    if stream and data is not None:
        raise TccpError("--stream and --data: give one of them")
    settings = settings_of(preset, set, max_steps)
    given_storage = storage or os.environ.get("TCCP_STORAGE")
    root = Folder(given_storage if given_storage and is_url(given_storage) else storage_root(given_storage).absolute())
    run_name = name or f"{stage}-{preset}"
    check_outputs(
        {"--name": root.path(f"runs/{run_name}")},
        {
            "--data": data,
            "--stream": stream,
            "--autoencoder": autoencoder,
            "--control-from": control_from,
            "--lip-weights": lip_weights,
            "--deepspeed": deepspeed,
        },
    )
    sources = {"stage1": stage1, "autoencoder": autoencoder}
    pretrained = None
    if autoencoder is not None and (Path(autoencoder) / "config.json").is_file():
        pretrained = Path(sources.pop("autoencoder") or "")
    components = tuple(variants) or DEFAULT[stage]
    for variant_name in variants:
        variant(variant_name)
    request = Request(
        components=components,
        settings=settings,
        table=None if stream else partial(_roundtable, settings, root) if data is None else lambda: data,
        films=_films(stream, backend, settings) if stream else None,
        storage=root,
        name=run_name,
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
        require_from=tuple(_pipeline(root, given) for given in sources.values() if given is not None),
        control_from=None if control_from is None else _pipeline(root, control_from),
        pretrained_autoencoder=pretrained,
        lip_weights=lip_weights,
        tracking=mlflow,
        register_as=register,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    done = launch(request, validate, note)
    record = {"pipeline": done.pipeline, "trained": done.trained, "taken": done.reused, "workers": done.workers}
    trained = ", ".join(done.trained) or "nothing, no component is missing"
    emit(json, record, f"trained {trained}; pipeline: {done.pipeline}")


VALIDATION_CLIPS = 4


def validate(job: Any, step: int, network: Any, folder: Path) -> dict[str, float]:
    """Implements `tccp.training.launcher.rank.Validate`. Other processes than the one that validates also load this
    module, so the imports are local."""
    from tccp.evaluation.validation import validate_network, validation_clips, with_network
    from tccp.inference.manifest import has_component

    with job.pipeline.as_local() as folder_here:
        if job.component in FIRST_OF and not has_component(folder_here, FIRST_OF[job.component]):
            return {}  # the network that generates its first frame is not trained yet
        pipeline = with_network(folder_here, job.component, network, "cuda" if job.allocation.use_gpu else "cpu")
        return validate_network(pipeline, job.component, validation_clips(job.settings, VALIDATION_CLIPS), folder)


def _parallel(zero_stage: int | None, offload: str, config: Path | None) -> DeepSpeedSettings:
    values: dict[str, Any] = {"zero_stage": zero_stage, "offload": offload}
    if config is not None:
        try:
            values["config"] = parse_json(config.read_bytes())
        except (OSError, ValueError) as error:
            raise TccpError(f"--deepspeed {config}: {error}; give a JSON file of DeepSpeed settings") from None
    try:
        return DeepSpeedSettings(**values)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise TccpError(f"--zero-stage {zero_stage} --offload {offload}: {reason}") from None


def _pipeline(storage: Folder, given: str) -> Folder:
    """The pipeline that `given` names: a run in the storage, or a pipeline folder or URL. Else raises TccpError."""
    run = Folder(storage.path(f"runs/{given}/pipeline"))
    folder = run if "/" not in given and run.exists("manifest.json") else Folder(given)
    if not folder.exists("manifest.json"):
        raise TccpError(f"{given} is neither a run in {storage} nor a pipeline folder with manifest.json")
    return folder


def _films(sources: Sequence[str], backend: str, settings: Settings) -> Callable[[VariantName, Path, float], Any]:
    """For the launcher: makes the training windows of a variant directly from films. Raises TccpError for missing
    sources."""
    from preprocessing.graph import film_windows
    from preprocessing.lip_step import lip_work
    from preprocessing.plan import make_plan
    from preprocessing.sources.listing import list_sources

    listing, plan = list_sources(list(sources)), make_plan(settings.picture_px, backend, None)

    def windows_of(name: VariantName, pipeline: Path, held: float) -> Any:
        row = VARIANTS[name]
        takes_lips = "lips" in row.conditions_with(settings.lips.source)
        lips = lip_work(settings.lips, pipeline / "lips") if takes_lips else None
        window = row.num_frames(settings.window)
        return partial(film_windows, listing=listing, plan=plan, settings=settings, window=window, lips=lips, held=held)

    return windows_of


FILMS, SECONDS, SEED = 72, 3.0, 1
"""The RoundTable films that jobs train on without --data and --stream."""


def roundtable_places(plan_key: str, storage: Folder) -> tuple[Folder, str]:
    """Where RoundTable's films and their clip table are in the storage: by the versions of what makes them.

    plan_key: of the preprocessing (`Plan.part_key`).
    """
    from tccp.roundtable import FILMS_VERSION

    films = Folder(storage.path(f"roundtable/films-{FILMS_VERSION}"))
    return films, storage.path(f"roundtable/clips-{FILMS_VERSION}-{plan_key}")


def _roundtable(settings: Settings, storage: Folder) -> str:
    """RoundTable's clip table in the storage. Draws and preprocesses the films if the table is missing. Needs Ray."""
    from preprocessing.plan import make_plan
    from preprocessing.run import preprocess
    from tccp.clips.clip_table import INDEX
    from tccp.roundtable import write_clips

    plan = make_plan(settings.picture_px, "truth")
    films, table = roundtable_places(plan.part_key, storage)
    if Folder(table).exists(INDEX):
        return table
    if sum(name.endswith(".mp4") for name in films.names()) < FILMS:
        with tempfile.TemporaryDirectory(prefix="tccp-films-") as folder, progress() as bar:
            task = bar.add_task("drawing scenes", total=FILMS * round(SECONDS * FPS))
            write_clips(folder, FILMS, SECONDS, SEED, progress=lambda name, done, total: bar.advance(task))
            films.upload(Path(folder), "")
    preprocess([str(films)], table, plan, on_ray=True)
    return table


def parse(stage: Stage, argv: Sequence[str] | None = None) -> Callable[[], None]:
    """Parses a job's command line (default: sys.argv) and returns the call that it asks for, without making it.

    Raises SystemExit: code 2 for wrong usage, 0 after --help.
    """
    return tyro.cli(partial(deferred(train), stage), prog=f"train_{stage}.py", args=argv)


def run(stage: Stage, argv: Sequence[str] | None = None) -> None:
    """The entry point of a job."""
    warnings.simplefilter("ignore", FutureWarning)
    with one_line_errors():
        parse(stage, argv)()
