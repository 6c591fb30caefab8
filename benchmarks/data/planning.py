"""Time the order: which samples a step takes."""

from rich.table import Table

from benchmarks.data.rounds import taking_turns
from datasets_etl.order import Order, rank_positions


def time_planning(rounds: int) -> Table:
    """Locate the samples of a step, for an epoch of 10⁹ positions and 10⁴ workers. Nothing is stored for any step."""
    order = Order(sizes=(600_000_000, 40_000, 1041), repeats=(1, 9_000, 38_000), seed=3)
    workers, each = 10_000, 8
    steps = iter(range(1, 10**9, 977))

    def one_rank() -> None:
        step = next(steps)
        order.locate(rank_positions(step, workers * each, step % workers, workers))

    def all_ranks() -> None:
        step = next(steps)
        order.locate(range(step * workers * each, (step + 1) * workers * each))

    spent = taking_turns({"one": one_rank, "all": all_ranks}, 20 * rounds)
    table = Table(
        title=f"Planning a step: {order.epoch_length:,} positions an epoch, {workers:,} workers, milliseconds"
    )
    for heading in (f"one worker's {each} samples (to reach: 1)", f"all {workers * each:,} samples of a step"):
        table.add_column(heading, justify="right")
    table.add_row(f"{1e3 * spent['one']:.3f}", f"{1e3 * spent['all']:.1f}")
    return table
