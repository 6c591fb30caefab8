"""Compare the ETL with a plain loop: pairs written per second."""

import tempfile
from functools import partial
from pathlib import Path

from rich.table import Table
from webdataset import TarWriter

from benchmarks.data.raw import Raw
from benchmarks.data.rounds import taking_turns
from datasets_etl.etl import run_etl
from datasets_etl.samples import encode_sample


def compare_writing(chairs: Raw, rounds: int) -> Table:
    """Compare ETL workers with a plain loop that uses webdataset's writer and the same encoding."""
    with tempfile.TemporaryDirectory() as folder:
        many = _repeated(chairs, Path(folder) / "raw", copies=120)
        tree, refs = many.tree, many.refs
        places = iter(range(10**6))

        def serial() -> None:
            with (Path(folder) / "serial.tar").open("wb") as file, TarWriter(file) as writer:
                for ref in refs:
                    writer.write(encode_sample(ref, tree)[0])

        def etl(workers: int) -> None:
            target = f"{folder}/out{next(places)}"
            run_etl("chairs", str(many.root), target, workers=workers, shard_bytes=15 * 2**20)

        spent = taking_turns({"serial": serial, "one": partial(etl, 1), "two": partial(etl, 2)}, rounds)
    table = Table(title=f"Writing {len(refs)} chairs pairs, pairs a second")
    for heading in ("serial writer", "one worker", "two workers", "one / serial (0.9)", "two / one (1.8)"):
        table.add_column(heading, justify="right")
    rates = {name: len(refs) / each for name, each in spent.items()}
    table.add_row(
        *(f"{rate:.1f}" for rate in rates.values()),
        f"{rates['one'] / rates['serial']:.2f}",
        f"{rates['two'] / rates['one']:.2f}",
    )
    return table


def _repeated(chairs: Raw, root: Path, copies: int) -> Raw:
    """The same pairs under more numbers, as symbolic links."""
    (root / "data").mkdir(parents=True)
    refs = chairs.refs
    for number in range(copies * len(refs)):
        ref = refs[number % len(refs)]
        stem = f"data/{number + 1:05d}"
        for path, end in ((ref.image0, "img1.ppm"), (ref.image1, "img2.ppm"), (ref.flow, "flow.flo")):
            (root / f"{stem}_{end}").symlink_to((chairs.root / str(path)).resolve())
    (root / "FlyingChairs_train_val.txt").write_text("1\n" * copies * len(refs))
    return Raw("chairs", root)
