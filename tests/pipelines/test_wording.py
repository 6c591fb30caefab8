"""Words for what commands print."""

from pipelines.wording import counted


def test_one_is_no_plural():
    assert [counted(number, "shard") for number in (0, 1, 2, 1041)] == [
        "0 shards",
        "1 shard",
        "2 shards",
        "1,041 shards",
    ]
