"""Trains a pipeline folder from a clip table: the auto-encoder, the lip source and the variants, in order."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tccp.clips.clip_table import ClipTable
from tccp.config import Settings, VariantName
from tccp.errors import TccpError
from tccp.files import Folder
from tccp.inference.manifest import check_settings, default_components, has_component
from tccp.inference.pipeline_folder import (
    load_autoencoder,
    load_network,
    restore_replaced,
    save_component,
    verified,
)
from tccp.models.variants import FIRST_OF, VARIANTS
from tccp.processes import end_with_parent, forking_context, in_processes
from tccp.progress import ProgressHandler, progress_handler, set_progress_handler
from tccp.threads import num_threads
from tccp.training.fit_autoencoder import train_autoencoder
from tccp.training.fit_variant import needs_first, train_variant
from tccp.training.latent_cache import LatentCache
from tccp.training.lip_folds import LipSources, lip_place, liplet_folder, open_lip_sources, train_liplets_once
from tccp.training.request_checks import check_training
from tccp.training.run_folder import RunFolder

logger = logging.getLogger("tccp.training")


def recipe(settings: Settings, names: Sequence[str] | None = None) -> tuple[tuple[str, ...], ...]:
    """Components in groups to train one after the other. A group needs only components of earlier groups.

    Within a group, the components that train longest come first, so that parallel jobs end together.
    names: components to train; by default those of the paper's pipeline, with lips if the settings use them.
    """
    if names is None:
        names = default_components(settings)
    sequences = tuple(name for name in names if name in FIRST_OF)
    firsts = tuple(name for name in names if name in VARIANTS and name not in FIRST_OF)
    others = tuple(name for name in names if name not in VARIANTS)
    firsts_before = any(needs_first(name, settings) for name in sequences)
    groups = (others, firsts, sequences) if firsts_before else (others, (*sequences, *firsts))
    return tuple(group for group in groups if group)


class Trainer:
    """Trains components of one pipeline folder on one clip table. Run folders and caches are in `storage`."""

    def __init__(
        self,
        data: Path,
        weights: Path,
        settings: Settings,
        storage: Path,
        *,
        resume: bool = False,
        restart: bool = False,
        device: str = "cpu",
        pretrained_autoencoder: Path | None = None,
        lip_weights: Path | None = None,
        control_from: Path | None = None,
        command: str | None = None,
    ):
        """restart: remove interrupted runs of the components that are trained, and begin anew.

        control_from: a pipeline folder whose video branches the networks start from (MVControlNet.start_control_from).
        command: the user's command line, for the provenance.
        """
        self.arguments: dict[str, Any] = {
            "data": data,
            "weights": weights,
            "settings": settings,
            "storage": storage,
            "resume": resume,
            "device": device,
            "pretrained_autoencoder": pretrained_autoencoder,
            "lip_weights": lip_weights,
            "control_from": control_from,
            "command": command,
        }
        if resume and restart:
            raise TccpError("--resume continues a run and --restart removes it: give one of them")
        restore_replaced(weights)
        check_settings(weights, settings)
        self.table = ClipTable(data, keep=64)
        self.weights = weights
        self.settings = settings
        self.storage = storage
        self.resume = resume
        self.restart = restart
        self.device = device
        self.pretrained_autoencoder = pretrained_autoencoder
        self.lip_weights = lip_weights
        self.control_from = control_from
        self.command = command
        self.data_hash = hashlib.blake2b(" ".join(self.table.ids).encode(), digest_size=8).hexdigest()
        self._lip_seconds: float | None = None

    def train(self, names: Sequence[str], jobs: int = 1) -> None:
        """Trains these components, up to `jobs` at a time, and adds each to the pipeline folder when it is finished.

        With small networks on a few cores, two processes of one thread each are faster than one process of two threads,
        whose threads wait for each other in every operation. On a GPU, leave `jobs` at 1.
        Raises TccpError for inputs that cannot be used, before training starts.
        """
        if jobs < 1:
            raise TccpError(f"jobs is {jobs}: give at least 1")
        names = tuple(dict.fromkeys(names))
        self._check(names)
        if self.restart:
            for name in names:
                shutil.rmtree(self._run_path(name), ignore_errors=True)
        for group in recipe(self.settings, names):
            if jobs > 1 and any(name in VARIANTS for name in group):
                self.cache_for(group)  # trains the liplets once, before the processes that read them start
                _in_processes(jobs, _build_part, [(self.arguments, group, part, jobs) for part in range(jobs)])
            if jobs > 1 and len(group) > 1:
                _in_processes(jobs, _train_one, [(self.arguments, name) for name in group])
                continue
            for name in group:
                self._train_one(name)

    def _check(self, names: Sequence[str]) -> None:
        """Raises TccpError for errors that would otherwise stop the training hours later."""
        check_training(
            self.arguments["data"],
            self.weights,
            self.settings,
            self.storage,
            names,
            autoencoder=self.pretrained_autoencoder,
            lip_weights=self.lip_weights,
            control_from=self.control_from,
        )
        for name in names:
            if not self.restart:
                RunFolder.check(self._run_path(name), self.settings, name, resume=self.resume)
            if self.control_from and name in VARIANTS:
                verified(self.control_from, name)
        source = self.settings.lips.source
        needs_lips = any("lips" in VARIANTS[name].conditions_with(source) for name in VARIANTS if name in names)
        if source == "wav2lip" and needs_lips and not has_component(self.weights, "lips"):
            open_lip_sources(self.settings.lips, self.lip_weights, self.device)

    def train_missing(self, jobs: int = 1) -> tuple[str, ...]:
        """Trains the missing components of the paper's pipeline, up to `jobs` at a time, and returns their names."""
        missing = self.missing()
        self.train(missing, jobs)
        return missing

    def missing(self) -> tuple[str, ...]:
        """The components of the paper's pipeline that the pipeline folder lacks, in training order.

        A component whose files are damaged counts as missing if its run may be resumed: the run exports it again.
        """
        names = itertools.chain.from_iterable(recipe(self.settings))
        return tuple(name for name in names if not self._has(name))

    def _has(self, name: str) -> bool:
        if not has_component(self.weights, name):
            return False
        try:
            if self.resume:
                verified(self.weights, name)
        except TccpError as error:
            logger.warning("%s is made again: %s", name, error)
            return False
        return True

    def _train_one(self, name: str) -> None:
        if name == "autoencoder":
            self._train_autoencoder()
        elif name == "lips":
            self._train_lips()
        else:
            self._train_variant(name)  # type: ignore[arg-type]

    def _run_path(self, name: str) -> Path:
        key = hashlib.blake2b(str(self.weights.resolve()).encode(), digest_size=4).hexdigest()
        return self.storage / "runs" / f"{self.weights.name}-{key}-{self.data_hash}" / name

    def _run(self, name: str) -> RunFolder:
        return RunFolder.open(self._run_path(name), self.settings, name, resume=self.resume)

    def _provenance(self, steps: int, seconds: float | None = None, **more: Any) -> dict[str, Any]:
        threads = torch.get_num_threads()
        return {
            "steps": steps,
            "seconds": None if seconds is None else round(seconds, 1),
            "core_minutes": None if seconds is None or self.device != "cpu" else round(seconds * threads / 60, 1),
            **more,
            "clips": len(self.table),
            "frames": sum(self.table.num_frames.values()),
            "data_hash": self.data_hash,
            "seed": self.settings.seed,
            "device": self.device if self.device != "cpu" else f"cpu, {threads} threads",
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "command": self.command,
        }

    def _train_autoencoder(self) -> None:
        run = self._run("autoencoder")
        autoencoder, result = train_autoencoder(
            self.settings, self.table, run, pretrained=self.pretrained_autoencoder, device=self.device
        )
        steps = self.settings.autoencoder.max_steps if result.seconds else 0  # 0: a pre-trained one, as it is
        provenance = self._provenance(steps, result.seconds, **_history(run))
        save_component(self.weights, "autoencoder", self.settings, autoencoder.save, provenance)

    def _train_lips(self) -> None:
        sources = self._own_lip_sources()
        if sources is None:
            raise TccpError(
                "lips.source is none, so there is no lip source to train: set lips.source, or leave out lips"
            )
        steps = self.settings.lips.liplet_steps if self.settings.lips.source == "liplet" else 0
        provenance = self._provenance(steps, self._lip_seconds)
        save_component(self.weights, "lips", self.settings, sources.for_new_footage.save, provenance)

    def _lip_sources(self) -> LipSources | None:
        """The lip sources for this table (see `lip_place`). Trains liplets on it if they are needed and missing."""
        place = lip_place(self.settings, self.weights, self.data_hash, Folder(self.storage), self.lip_weights)
        if place is None:
            return None
        if place.to_train:
            self._train_liplets()
        return place.open(self.device)

    def _own_lip_sources(self) -> LipSources | None:
        """The lip sources of the settings, even if the pipeline folder already has others."""
        lips = self.settings.lips
        if lips.source != "liplet":
            return open_lip_sources(lips, self.lip_weights, self.device)
        return open_lip_sources(lips, self._train_liplets(), self.device)

    def _train_liplets(self) -> Path:
        folder = self.storage / liplet_folder(self.data_hash, self.settings.seed, self.settings.lips)
        self._lip_seconds = train_liplets_once(self.table, self.settings, folder, self.device)
        return folder

    def cache_for(self, names: Iterable[str]) -> LatentCache:
        """The cache of the latents, and lips if needed, that these variants read; `build()` computes them."""
        names = tuple(names)
        source = self.settings.lips.source
        needs_lips = any("lips" in VARIANTS[name].conditions_with(source) for name in VARIANTS if name in names)
        autoencoder = load_autoencoder(self.weights, self.device)
        lips = self._lip_sources() if needs_lips else None
        return LatentCache(self.storage, self.table, self.settings, autoencoder, lips, names)

    def _train_variant(self, name: VariantName) -> None:
        settings = self.settings.for_variant(name)
        first = None
        if needs_first(name, self.settings):
            first = load_network(self.weights, FIRST_OF[name], self.device)
        start_from = load_network(self.control_from, name, self.device) if self.control_from else None
        cache = self.cache_for([name])
        cache.build()
        run = self._run(name)
        model, result = train_variant(
            name, self.settings, cache, run, first=first, start_from=start_from, device=self.device
        )
        last = result.losses[-50:]  # empty if the run was complete and only its export was missing
        provenance = self._provenance(
            settings.training.max_steps,
            result.seconds,
            **_history(run),
            last_losses=float(f"{sum(last) / len(last):.5g}") if last else None,
            **({"windows_set_aside": cache.windows_set_aside} if cache.windows_set_aside else {}),
        )
        assert model is not None  # this process is rank 0
        save_component(self.weights, name, self.settings, model.save_pretrained, provenance)


def _history(run: RunFolder) -> dict[str, Any]:
    """For the provenance: the commit that a run began with, and changes of settings with which it was resumed."""
    return {"git_commit": run.git_commit, **({"changes": run.changes} if run.changes else {})}


def _in_processes(jobs: int, work: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> None:
    """Calls `work` in up to `jobs` processes at a time. An error ends them: only steps since checkpoints are lost."""
    threads = num_threads(jobs)
    in_processes(forking_context(__name__), jobs, work, calls, _start_process, (threads, progress_handler()))


def _start_process(threads: int, handler: ProgressHandler | None) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    set_progress_handler(handler)


def _build_part(arguments: dict[str, Any], names: Sequence[str], part: int, parts: int) -> None:
    Trainer(**arguments).cache_for(names).build(part, parts)


def _train_one(arguments: dict[str, Any], name: str) -> None:
    Trainer(**arguments).train([name])
