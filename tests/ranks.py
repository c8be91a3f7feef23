"""What ranks of a torch process group do in tests of DeepSpeed: `together` starts each in a process of its own."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import forked
import trainings

SERVER = forked.Server(
    [
        "torch",
        "tccp.training.engine:_import_deepspeed",
        "tccp.training.fit_variant",
        "tccp.training.latent_cache",
        "tccp.training.loop",
        "tccp.training.run_folder",
    ]
)
"""Ranks are forked from a process that has imported torch and DeepSpeed, which costs 10 CPU seconds."""


def together(num_ranks: int, arguments: dict[str, Any], out: Path) -> Any:
    """Runs this module on so many ranks with these arguments, and returns what rank 0 has written."""
    given = {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(trainings.free_port()),
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as undo:
        logs, ranks = [], []
        for rank in range(num_ranks):
            logs.append(undo.enter_context(tempfile.TemporaryFile("w+")))
            environment = {**given, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            streams = {"stdout": logs[-1], "stderr": logs[-1]}
            script = [__file__, json.dumps(arguments), out]
            ranks.append(SERVER.start(script, cwd=forked.ROOT, environment=environment, **streams))
            undo.callback(ranks[-1].kill)
        codes = [rank.wait(timeout=1800) for rank in ranks]  # ends a hang, not a slow machine
        if any(codes):
            raise AssertionError("\n".join(_end_of(log) for log in logs))
    return json.loads(out.read_text())


def _end_of(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-3000:]


def main(arguments: dict[str, Any], out: Path) -> None:
    import torch

    from tccp.clips.clip_table import ClipTable
    from tccp.config import DeepSpeedSettings, load_settings
    from tccp.models.autoencoder import PictureAutoencoder
    from tccp.training.averaged_weights import AveragedWeights
    from tccp.training.engine import DeepSpeedEngine
    from tccp.training.fit_variant import VariantLoss, new_network
    from tccp.training.latent_cache import LatentCache
    from tccp.training.loop import NonFiniteLoss, fit
    from tccp.training.run_folder import RunFolder

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    settings = load_settings("toy", arguments["overrides"])
    autoencoder = PictureAutoencoder.load(Path(arguments["autoencoder"])).eval()
    cache = LatentCache(Path(arguments["storage"]), ClipTable(arguments["data"]), settings, autoencoder, None, [NAME])

    class Rank(RunFolder):
        """A run in one folder that all ranks share."""

        def mean(self, value: torch.Tensor) -> float:
            shared = value / num_ranks
            torch.distributed.all_reduce(shared)
            return float(shared)

        def saving(self, step, metrics):
            import contextlib

            @contextlib.contextmanager
            def folder():
                place = self.checkpoint(step)
                place.mkdir(parents=True, exist_ok=True)
                torch.distributed.barrier()
                yield place
                torch.distributed.barrier()

            return folder()

        def record(self, values):
            if rank == 0:
                super().record(values)

    results = {}
    for stage in arguments["stages"]:
        path = Path(arguments["runs"]) / str(stage)
        path.mkdir(parents=True, exist_ok=True)
        run = Rank(path, rank, num_ranks)
        model = new_network(NAME, settings)
        losses = VariantLoss(model, NAME, settings, cache, None, rank, num_ranks)
        if arguments.get("break_at") is not None and rank == num_ranks - 1:
            losses = Broken(losses, arguments["break_at"])
        given = DeepSpeedSettings(zero_stage=stage, config=CONFIG)
        engine = DeepSpeedEngine(losses.module, settings.training, given, run.newest())
        losses.forward = engine.forward
        ema = AveragedWeights(engine.local_parameters(), decay=settings.training.ema_decay)
        try:
            result = fit(
                engine,
                losses,
                settings.training,
                seed=settings.seed,
                ema=ema,
                run=run,
                stop_at=arguments.get("stop_at"),
                describe_step=losses.describe_step,
            )
        except NonFiniteLoss as error:
            results[stage] = {"error": str(error)}
            continue
        weights = engine.gather(ema.weights)
        held = sum(p.numel() for p in engine.local_parameters())
        results[stage] = {
            "losses": result.losses,
            "ema": [float(w.double().abs().sum()) for w in weights] if rank == 0 else [],
            "held": held / sum(p.numel() for p in new_network(NAME, settings).parameters()),
        }
    if rank == 0:
        out.write_text(json.dumps(results))
    torch.distributed.barrier()


NAME = "landmark_first"
CONFIG = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}  # so that a small network is divided, too


class Broken:
    """A loss that is not a number on this rank, at one step."""

    def __init__(self, losses: Any, step: int):
        self.losses, self.at = losses, step
        self.module, self.describe_step = losses.module, losses.describe_step

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            self.losses.forward = value
        object.__setattr__(self, name, value)

    def __call__(self, step: int, micro: int) -> Any:
        value = self.losses(step, micro)
        return value * float("nan") if step == self.at else value


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
