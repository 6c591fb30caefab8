"""What is measured on the project's own code and on real samples: bytes of parameters, checkpoints and samples."""

import tempfile
from dataclasses import dataclass

from benchmarks.data.raw import Raw, real_samples
from datasets_etl.shards import plan_shards, write_shard
from datasets_etl.storage import open_store
from gmflow import GMFlow
from pipelines.training.config import CurriculumConfig
from pipelines.training.state import TrainingState, to_bytes


@dataclass(frozen=True)
class Measured:
    """Figures measured on this project's own code and data.

    Attributes:
        parameter_bytes: bytes of the float32 parameters; every step all-reduces the same number of bytes of gradients.
        checkpoint_bytes: size of a stored `TrainingState.snapshot`.
        sample_bytes: mean bytes of a sample in real shards, by dataset; one ranged read fetches one sample.
    """

    parameter_bytes: int
    checkpoint_bytes: int
    sample_bytes: dict[str, float]


def measure(config: CurriculumConfig) -> Measured:
    """Measure a config's model, and the real samples whose folders GMFLOW_SAMPLES and GMFLOW_FORMAT_SAMPLES name."""
    model = GMFlow(config.model.build())
    state = TrainingState.fresh(model, config.stages[0])
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0
    state.optimizer.step()  # Adam's moments exist from the first step on
    return Measured(
        parameter_bytes=sum(parameter.numel() * 4 for parameter in model.parameters()),
        checkpoint_bytes=len(to_bytes(state.snapshot())),
        sample_bytes={raw.name: _sample_bytes(raw) for raw in real_samples() if raw.root.exists()},
    )


def _sample_bytes(raw: Raw) -> float:
    tree, refs = raw.tree, raw.refs
    (plan,) = plan_shards(refs, {ref.key: 1 for ref in refs}, dict.fromkeys(tree.files, ""), 2**40)
    with tempfile.TemporaryDirectory() as folder:
        written = write_shard(plan, tree, open_store(folder))
    if written.entry is None:
        raise RuntimeError(f"{raw.root}: nothing but damaged pairs")
    return sum(sample.length for sample in written.entry.samples) / len(written.entry.samples)
