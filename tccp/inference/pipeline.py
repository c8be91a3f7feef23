"""The public API of generation: load a pipeline once, generate many films.

import tccp

pipeline = tccp.Pipeline.from_pretrained("toy")
for frame in pipeline.generate("film.mp4", "speech.wav", "face.png"):
    show(frame.picture)
tccp.generate_film(tccp.FilmRequest("film.mp4", "speech.wav", "face.png", out="out.mp4"), pipeline=pipeline)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tccp.errors import TccpError
from tccp.inference.components import Components, load_components
from tccp.inference.film import FilmInputs, FilmRequest, FilmResult, OnFrame, check_batch
from tccp.inference.film_generation import FilmOutcome, check_requests, film_frames, write_film, write_films
from tccp.inference.frames import GeneratedFrame
from tccp.inference.pipeline_folder import check_network, load_network
from tccp.inference.pipeline_source import component_names, pipeline_folder
from tccp.models.variants import TWO_STAGE, VariantName
from tccp.progress import ProgressHandler, progress

_NOT_OF_FRAMES = {"out", "save_landmarks", "lossless", "weights", "preset", "device", "lip_weights"}
"""Fields of FilmRequest that frames do not have: they belong to loading, or to the film that is written."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Pipeline(Components):
    """Loaded networks that generate any number of films. Use it in one thread at a time.

    source: the folder, URL or Hub id that it was loaded from. dtype, revision: as given to `from_pretrained`.
    """

    source: str = ""
    dtype: torch.dtype = torch.float32
    revision: str | None = field(default=None, repr=False)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "toy",
        *,
        variants: Iterable[VariantName] = TWO_STAGE,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float32,
        preset: str | None = None,
        lip_weights: Path | None = None,
        revision: str | None = None,
    ) -> Pipeline:
        """Loads a pipeline.

        source: a local pipeline folder; the URL of one on any fsspec filesystem (`s3://bucket/pipeline`); the id of a
          model repository on the Hugging Face Hub (`owner/name`, `revision`: branch, tag or commit); or `toy`, the
          packaged weights. Remote files are copied to the local cache. Every file is checked against the manifest.
        variants: networks to load now; others are loaded when a request needs them.
        device: cpu, cuda, cuda:N, or auto (a GPU if there is one).
        dtype: of the networks' and the auto-encoder's weights and arithmetic: float32, bfloat16 or float16.
        preset: raise TccpError if the weights are of another preset. lip_weights: the published Wav2Lip checkpoint,
          which replaces the pipeline's own lip weights.
        Raises TccpError for a source that is missing, incomplete or damaged, StorageError if it cannot be reached.
        """
        names = tuple(variants)
        folder = pipeline_folder(source, component_names(names, own_lips=lip_weights is None), revision)
        resolved = _device(device)
        loaded = load_components(
            folder, names, preset=preset, device=resolved, dtype=_dtype(dtype), lip_weights=lip_weights
        )
        parts = {one.name: getattr(loaded, one.name) for one in dataclasses.fields(Components)}
        parts["networks"] = dict(loaded.networks)
        return cls(**parts, source=str(source), dtype=_dtype(dtype), revision=revision)

    def generate(
        self,
        scene: str | Path,
        audio: str | Path,
        identity: str | Path,
        *,
        on_progress: ProgressHandler | None = None,
        **options: Any,
    ) -> Iterator[GeneratedFrame]:
        """Generates the head of `identity` into `scene`, speaking `audio`; yields the frames of the film, in order.

        The film has 25 frames per second of sound. Frames come window by window (8 frames), as they are finished;
        memory use does not grow with film length. options: the other fields of `FilmRequest`, such as seed, box, steps,
        but those of loading and writing.
        The first `next` raises TccpError or MediaError for inputs that cannot be used.
        """
        misplaced = sorted(_NOT_OF_FRAMES & options.keys())
        if misplaced:
            raise TccpError(
                f"Pipeline.generate takes no {', '.join(misplaced)}: give loading options to Pipeline.from_pretrained, "
                "and options of the written film to tccp.generate_film"
            )
        request = FilmRequest(Path(scene), Path(audio), Path(identity), **options)
        with FilmInputs(request, loaded=True) as inputs, progress(on_progress) as tasks:
            yield from film_frames(self.with_networks(request.variants), inputs, tasks)

    def with_networks(self, names: Iterable[VariantName]) -> Pipeline:
        """Loads those of these networks that the pipeline lacks, and returns the pipeline."""
        missing = [name for name in names if name not in self.networks]
        if missing:
            folder = pipeline_folder(self.source, missing, self.revision)
            networks = dict(self.networks)
            for name in missing:
                network = load_network(folder, name, self.device, self.dtype)
                check_network(folder, self.settings, name, network)
                networks[name] = network
            self.networks.update(networks)  # type: ignore[attr-defined]
        return self


def generate_film(
    request: FilmRequest,
    *,
    pipeline: Pipeline | None = None,
    on_frame: OnFrame | None = None,
    on_progress: ProgressHandler | None = None,
    inputs: FilmInputs | None = None,
) -> FilmResult:
    """Generates the film of a request and writes it, with the sound, to `request.out`.

    pipeline: a loaded pipeline; None: `request.weights` is loaded after the inputs are checked. on_frame: called with
    every finished frame, whose landmark fields are filled then. on_progress: called with `ProgressEvent`s; None: the
    process's handler. inputs: those of the request, if they are open already.
    `request.out` appears only when the film is complete. The film is marked as generated.
    Raises TccpError or MediaError for inputs that cannot be used, before generation where possible.
    """

    def load(given: FilmRequest) -> Components:
        if pipeline is not None:
            return pipeline.with_networks(given.variants)
        return Pipeline.from_pretrained(
            given.weights,
            variants=given.variants,
            device=given.device,
            preset=given.preset,
            lip_weights=given.lip_weights,
        )

    if pipeline is not None:
        request = dataclasses.replace(request, weights=pipeline.source)
    return write_film(request, load, on_frame, on_progress, inputs, loaded=pipeline is not None)


def generate_films(
    requests: Sequence[FilmRequest],
    *,
    pipeline: Pipeline,
    batch: int = 4,
    on_progress: ProgressHandler | None = None,
) -> Iterator[FilmOutcome]:
    """Generates the films of some requests and writes them; yields what became of each as it ends.

    Up to `batch` films, or shots of them, are generated at once and share evaluations of the networks. A film that
    cannot be made is reported, and the others go on. The weights are those of `pipeline`. A film is the same as that of
    `generate_film` with `batch` 1, and up to rounding with others.
    Raises TccpError if `batch` is out of range or two requests write the same file.
    """
    check_batch(batch)
    requests = [dataclasses.replace(request, weights=pipeline.source, batch=batch) for request in requests]
    check_requests(requests)
    by_networks: dict[tuple[VariantName, ...], list[FilmRequest]] = {}
    for request in requests:
        by_networks.setdefault(request.variants, []).append(request)
    for variants, own in by_networks.items():
        yield from write_films(own, pipeline.with_networks(variants), batch=batch, on_progress=on_progress)


def _device(given: str | torch.device) -> torch.device:
    if str(given) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(given)
    except RuntimeError:
        raise TccpError(f"device {given}: give cpu, cuda, cuda:N or auto") from None


def _dtype(given: str | torch.dtype) -> torch.dtype:
    if isinstance(given, torch.dtype) and given in _DTYPES.values():
        return given
    if str(given) not in _DTYPES:
        raise TccpError(f"dtype {given}: give one of {', '.join(_DTYPES)}")
    return _DTYPES[str(given)]
