"""Compare encodings of frames and flow: size, seconds to encode and to decode, on real samples."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from rich.table import Table

from benchmarks.data.candidates import FLOW_CODES, FRAME_CODES, Array, Code
from benchmarks.data.raw import Raw, read_flow
from benchmarks.data.rounds import taking_turns
from datasets_etl import formats


def compare_codes(raws: Sequence[Raw], rounds: int) -> Iterator[Table]:
    frames = {raw.name: _some_frames(raw) for raw in raws}
    yield _table("Frames", FRAME_CODES, frames, rounds)
    flows = {raw.name: _some_flows(raw) for raw in raws if not any(ref.is_sparse for ref in raw.refs)}
    yield _table("Dense flow", FLOW_CODES, flows, rounds)


def _some_frames(raw: Raw) -> list[Array]:
    return [formats.decode_frame(raw.tree.read(ref.image0), ref.image0) for ref in raw.refs[::2]][:2]


def _some_flows(raw: Raw) -> list[Array]:
    return [read_flow(raw.tree, ref)[0] for ref in raw.refs[::2]][:2]


def _table(title: str, candidates: Mapping[str, Code], arrays: Mapping[str, list[Array]], rounds: int) -> Table:
    table = Table(title=f"{title}: size over raw, milliseconds to encode, milliseconds to decode")
    table.add_column("code")
    for name, some in arrays.items():
        table.add_column(f"{name} {some[0].shape[1]}x{some[0].shape[0]}", justify="right")
    columns = [_measured(candidates, some, rounds) for some in arrays.values()]
    for name in candidates:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _measured(candidates: Mapping[str, Code], arrays: list[Array], rounds: int) -> dict[str, str]:
    encoding = taking_turns({name: partial(_encode_all, code, arrays) for name, code in candidates.items()}, rounds)
    encoded = {name: _encode_all(code, arrays) for name, code in candidates.items()}
    for name, code in candidates.items():
        for array, data in zip(arrays, encoded[name], strict=True):
            if code.decode(data, array.shape[:2]).tobytes() != array.tobytes():
                raise RuntimeError(f"{name} is not lossless")
    decoding = taking_turns(
        {name: partial(_decode_all, code, arrays, encoded[name]) for name, code in candidates.items()}, rounds
    )
    raw = sum(array.nbytes for array in arrays)
    return {
        name: f"{sum(map(len, encoded[name])) / raw:.3f} {1e3 * encoding[name] / len(arrays):5.0f} "
        f"{1e3 * decoding[name] / len(arrays):5.1f}"
        for name in candidates
    }


def _encode_all(code: Code, arrays: list[Array]) -> list[bytes]:
    return [code.encode(array) for array in arrays]


def _decode_all(code: Code, arrays: list[Array], encoded: list[bytes]) -> None:
    for array, data in zip(arrays, encoded, strict=True):
        code.decode(data, array.shape[:2])
