"""Words for what commands print."""


def counted(number: int, noun: str) -> str:
    """A number of things: "1 shard", "2 shards", "1,041 pairs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
