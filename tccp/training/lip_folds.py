"""Lip references for training: cross-fitted Liplets, and the folder of lip pictures made by them.

A network that was trained on a clip renders better lips for it than for new footage. So the clips are split into two
folds: each fold is served by the network trained on the other one, and new footage by that of fold 0.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from tccp.clips.clip_table import Clip, ClipTable, decode_still
from tccp.clips.lip_table import LIPS, LipFiles
from tccp.clips.windows import clip_sound
from tccp.config import LipSettings, Settings
from tccp.errors import DamagedData, TccpError
from tccp.files import Folder, atomic_folder, write_atomic
from tccp.inference.manifest import has_component, read_manifest
from tccp.inference.pipeline_folder import verified
from tccp.inference.pipeline_source import pipeline_folder
from tccp.media.mel import MEL_VERSION
from tccp.models.lip_sources import LipletSource, LipSource, load_liplet, open_lip_source
from tccp.progress import progress
from tccp.seeds import rng_seed
from tccp.strict_json import parse_json
from tccp.training.fit_liplet import LIPLET_VERSION, collect_samples, train_liplet
from tccp.training.set_aside import readable, say_set_aside

logger = logging.getLogger("tccp.training")

FOLDS = 2
FOLDS_RECORD = "folds.json"
SECONDS_FILE = "spent.json"
_RECORD_VERSION = 1


def assign_folds(sources: Mapping[str, str]) -> dict[str, int]:
    """Assigns every clip to a fold; `sources` maps clip_id to the hash of the file that the clip was cut from.

    Clips of one source stay together, unless all clips have the same one. Sources (or clips) go to the folds in turn,
    in the order of a stable hash: so the folds differ by at most one and do not depend on the order of the table.
    Raises TccpError if there are fewer than two clips.
    """
    if len(sources) < FOLDS:
        raise TccpError(
            f"liplet is never trained on the clip it serves: it needs {FOLDS} clips or more, given {len(sources)}; "
            "cut the footage into shorter clips or set lips.source=none"
        )
    by_clip = len(set(sources.values())) == 1
    group = {clip_id: clip_id if by_clip else source for clip_id, source in sources.items()}
    order = sorted(set(group.values()), key=lambda name: (rng_seed("lip fold", name), name))
    fold = {name: i % FOLDS for i, name in enumerate(order)}
    return {clip_id: fold[group[clip_id]] for clip_id in sources}


def train_liplets(
    table: ClipTable,
    settings: Settings,
    out: Path,
    seed: int,
    on_step: Callable[[int, int, float], None] | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Trains the cross-fitted networks into `out`, and returns it. A complete fold is not trained again.

    `out/fold_<k>` serves the clips of fold k (it is trained on all others); `out/folds.json` records each clip's.
    on_step: called with (fold, steps done, loss).
    Raises TccpError if there are too few clips, or `out` holds networks of other clips, settings or seed.
    """
    sources = table.source_hash
    folds = assign_folds(sources)
    record = {
        "version": _RECORD_VERSION,
        "seed": seed,
        "settings": settings.lips.model_dump(mode="json"),
        "folds": folds,
        "sources": sources,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / FOLDS_RECORD
    known = _read_json(path)
    if known is None:
        write_atomic(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    elif known != record:
        raise TccpError(f"{out} holds liplets of other clips, settings or seed: give another folder or remove this one")
    for fold in range(FOLDS):
        place = out / f"fold_{fold}"
        if _is_complete(place):
            continue
        train_ids = [clip_id for clip_id in table.ids if folds[clip_id] != fold]
        samples = collect_samples(
            readable(train_ids, table.__getitem__),
            sum(table.num_frames[clip_id] for clip_id in train_ids),
            settings.lips.size_px,
        )
        report = (lambda step, loss, fold=fold: on_step(fold, step, loss)) if on_step else None
        network = train_liplet(samples, settings.lips, rng_seed("lip fold", seed, fold), report, device)
        with atomic_folder(place) as partial:  # it takes the place of a damaged one
            network.save_pretrained(partial)
    return out


def _is_complete(fold: Path) -> bool:
    """Whether a fold's network can be loaded. One that cannot, after a loss of power or half an upload, is named."""
    if not fold.exists():
        return False
    try:
        load_liplet(fold)
    except TccpError as error:
        logger.warning("%s is damaged and trained anew: %s", fold, error)
        return False
    return True


def _read_json(path: Path) -> Any:
    """The content of a file; None if it is missing, or not whole because the machine stopped while it was written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def train_liplets_once(table: ClipTable, settings: Settings, out: Path, device: str | torch.device = "cpu") -> float:
    """`train_liplets` with a progress bar; returns the seconds that the training took, now or earlier."""
    record = out / SECONDS_FILE
    with progress() as bar:
        steps = settings.lips.liplet_steps
        task = bar.add_task("liplet", total=FOLDS * steps)

        def on_step(fold: int, step: int, loss: float) -> None:
            bar.update(task, completed=fold * steps + step)

        started = time.monotonic()
        train_liplets(table, settings, out, settings.seed, on_step, device)
    if (known := _read_json(record)) is None:
        known = {"seconds": time.monotonic() - started}
        write_atomic(record, (json.dumps(known) + "\n").encode())
    return float(known["seconds"])


@dataclass(frozen=True)
class LipSources:
    """The source for each clip. `sources` has one entry per fold, or a single one not trained on these clips."""

    sources: tuple[LipSource, ...]
    folds: Mapping[str, int] = field(default_factory=dict)
    source_folds: Mapping[str, set[int]] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Hash of all networks together: the key of the derived table."""
        return hashlib.blake2b(" ".join(source.hash for source in self.sources).encode(), digest_size=8).hexdigest()

    @property
    def for_new_footage(self) -> LipSource:
        """The source for generation, which a pipeline folder contains."""
        return self.sources[0]

    def for_clip(self, clip_id: str, source_hash: str) -> LipSource:
        """The source whose network was trained neither on this clip nor on others of the same footage."""
        if len(self.sources) == 1:
            return self.sources[0]
        if clip_id in self.folds:
            return self.sources[self.folds[clip_id]]
        folds = self.source_folds.get(source_hash, {0})
        if len(folds) > 1:
            raise TccpError(
                f"clip {clip_id} was added after the liplets were trained, and all of them were trained on other clips "
                "of the same file: train them again on the present clips"
            )
        return self.sources[next(iter(folds))]


def open_lip_sources(
    settings: LipSettings, weights: Path | None, device: str | torch.device = "cpu"
) -> LipSources | None:
    """Lip sources for a clip table; None for `lips.source=none`.

    weights: a Wav2Lip `.pth`, or the folder written by `train_liplets`.
    Raises TccpError if they are missing or incomplete, or if their picture size differs from the settings.
    """
    if settings.source != "liplet":
        source = open_lip_source(settings, weights, device)
        return None if source is None else LipSources((source,))
    if weights is None:
        raise TccpError("lips.source=liplet needs the folder of cross-fitted liplets: train them first")
    if not (weights / FOLDS_RECORD).is_file():
        raise TccpError(f"{weights} holds no cross-fitted liplets ({FOLDS_RECORD} is missing): train them first")
    record = _read_record(weights / FOLDS_RECORD)
    networks = [load_liplet(weights / f"fold_{fold}") for fold in range(FOLDS)]
    for fold, network in enumerate(networks):
        if network.config.size_px != settings.size_px:
            raise TccpError(
                f"liplet {weights}/fold_{fold} draws {network.config.size_px} px pictures; lips.size_px is "
                f"{settings.size_px}: use the settings it was trained with"
            )
    source_folds: dict[str, set[int]] = {}
    for clip_id, source_hash in record["sources"].items():
        source_folds.setdefault(source_hash, set()).add(record["folds"][clip_id])
    return LipSources(tuple(LipletSource(network, device) for network in networks), record["folds"], source_folds)


def _read_record(path: Path) -> dict[str, Any]:
    """The record of cross-fitted networks. Raises TccpError if it is damaged or of another version."""
    try:
        record = dict(parse_json(path.read_bytes()))
        if record.get("version") != _RECORD_VERSION:
            version = f"{record.get('version')!r:.40}"
            raise TccpError(f"{path}: version {version}, this is {_RECORD_VERSION}; train them again")
        folds, sources = record["folds"], record["sources"]
        whole = folds.keys() == sources.keys() and all(fold in range(FOLDS) for fold in folds.values())
        if not whole or not all(isinstance(source, str) for source in sources.values()):
            raise ValueError("folds and sources do not fit each other")
    except TccpError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TccpError(f"{path} is damaged ({type(error).__name__}: {error}): copy it again") from None
    return record


@dataclass(frozen=True)
class LipPlace:
    """The place of the lip sources of a clip table: cross-fitted liplets, or one network. It is pickled."""

    settings: LipSettings
    folder: Folder
    to_train: bool = False  # liplets on this table, into the folder
    in_pipeline: bool = False  # the folder is a pipeline's, whose lips they are

    def open(self, device: str | torch.device = "cpu") -> LipSources:
        """Loads the sources. Raises TccpError if they are missing or incomplete, or differ from the manifest."""
        if self.in_pipeline:
            return _one_source(self.settings, verified(pipeline_folder(self.folder.place, [LIPS]), LIPS), device)
        with self.folder.as_local() as place:
            alone = (place / "config.json").exists() and not (place / FOLDS_RECORD).exists()
            if self.settings.source == "liplet" and alone:
                return _one_source(self.settings, place, device)
            sources = open_lip_sources(self.settings, place, device)
            assert sources is not None
            return sources


def _one_source(settings: LipSettings, folder: Path, device: str | torch.device) -> LipSources:
    source = open_lip_source(settings, folder, device)
    assert source is not None
    return LipSources((source,))


def liplet_folder(data_hash: str | None, seed: int | None, settings: LipSettings) -> str:
    """Folder in a storage for the liplets that are cross-fitted on a clip table."""
    key = f"{data_hash} {seed} {settings.model_dump_json()} {LIPLET_VERSION} {MEL_VERSION}"
    return f"{LIPS}/{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def lip_place(
    settings: Settings, pipeline: Path, data_hash: str, storage: Folder, weights: str | Path | None = None
) -> LipPlace | None:
    """The lip sources for this table: those of the pipeline if it has any, because generation will use them.

    Clips that the pipeline's liplet was trained on get the other one of its cross-fitted pair. weights: Wav2Lip's
    checkpoint, in place of the pipeline's. None if the settings have no lips.
    Raises TccpError if Wav2Lip's weights are needed and missing.
    """
    lips = settings.lips
    if lips.source == "none":
        return None
    has_own = has_component(pipeline, LIPS)
    if lips.source != "liplet":
        if weights is None and not has_own:
            open_lip_source(lips, None)  # raises TccpError
        if weights is not None:
            return LipPlace(lips, Folder(weights))
        return LipPlace(lips, Folder(pipeline), in_pipeline=True)
    own = Folder(storage.path(liplet_folder(data_hash, settings.seed, lips)))
    if not has_own:
        return LipPlace(lips, own, to_train=True)
    trained = read_manifest(pipeline)["components"][LIPS].get("provenance", {})
    if trained.get("data_hash") == data_hash:
        return LipPlace(lips, own, to_train=True)
    sibling = Folder(storage.path(liplet_folder(trained.get("data_hash"), trained.get("seed"), lips)))
    if sibling.exists(FOLDS_RECORD):
        return LipPlace(lips, sibling)
    return LipPlace(lips, Folder(pipeline), in_pipeline=True)


def lip_pictures(clip: Clip, source: LipSource) -> UInt8[np.ndarray, "f s s 3"]:
    """Lip pictures of a clip from its sound and its first identity picture, not from its faces."""
    samples, start_frame = clip_sound(clip)
    return source.lips(source.windows(samples, start_frame, clip.num_frames), decode_still(clip.identity[0]))


class LipTable:
    """Renders the lip pictures of clips into a folder.

    also: folders of the same layout that may already have pictures: preprocessing renders some beside the clips.
    """

    def __init__(self, folder: Folder | Path | str, sources: LipSources, also: Sequence[Folder] = ()) -> None:
        self.folder = folder if isinstance(folder, Folder) else Folder(folder)
        self.sources = sources
        self.pictures = LipFiles(sources.hash, (self.folder, *also))

    def name(self, clip_id: str) -> str:
        return self.pictures.name(clip_id)

    def __contains__(self, clip_id: str) -> bool:
        return clip_id in self.pictures

    def render(self, clip: Clip) -> None:
        """Renders the lips of a clip, and replaces existing ones."""
        content = io.BytesIO()
        np.save(content, lip_pictures(clip, self.sources.for_clip(clip.clip_id, clip.source_hash)), allow_pickle=False)
        self.folder.write(self.name(clip.clip_id), content.getvalue())

    def write(
        self,
        table: ClipTable,
        on_clip: Callable[[int, int], None] | None = None,
        clip_ids: Sequence[str] | None = None,
    ) -> int:
        """Renders the lips of every clip (or of these) that has none yet; returns their number.

        A damaged clip is set aside: it gets no lips. on_clip: called with (done, total).
        """
        rendered = 0
        chosen = table.ids if clip_ids is None else clip_ids
        for done, clip_id in enumerate(chosen, 1):
            if clip_id not in self:
                try:
                    self.render(table[clip_id])
                    rendered += 1
                except DamagedData as error:
                    say_set_aside(f"clip {clip_id}", error)
            if on_clip is not None:
                on_clip(done, len(chosen))
        return rendered

    def read(self, clip_id: str, start_frame: int = 0, num_frames: int | None = None) -> UInt8[np.ndarray, "f s s 3"]:
        """Like `LipFiles.read`."""
        return self.pictures.read(clip_id, start_frame, num_frames)
