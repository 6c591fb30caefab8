"""softmax(q·k / √C) · v over the whole map or a neighbourhood, and the building blocks of attention in windows.

None of them stores the scores of a whole map at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmflow.eager import outside_graphs
from gmflow.scratch import Scratch

EXCLUDED = -1e9
"""Score of a pair that must not match. It is finite, so that a query without any partner gives no NaN."""

TILE = 8
"""Side of the query tiles of `neighbourhood_attention`."""

STRIP = 1 << 22
"""Scores of `neighbourhood_attention` computed at a time, which bounds its memory at any image size."""

SCORES = 1 << 21
"""Scores that a CPU computes at a time: 8 MiB of float32, which stay in its cache (docs/performance.md)."""

ACCELERATOR_SCORES = 1 << 26
"""Scores that an accelerator computes at a time, in the backward pass alone: enough to keep it busy."""

ROWS = 1 << 9
"""Where `SCORES` allow fewer queries than this, a CPU attends this many at a time: products of few rows are slow."""

TOKENS = 1 << 11
"""Queries of several windows that a CPU attends at a time at most.

Their projections then stay in the cache beside the scores.
"""

ALL = slice(None)
"""Every row."""

CROSSING_PENALTY = -100.0
"""Added to the score of two tokens from different regions of a window."""


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every query attends to every key.

    On accelerators the forward pass is PyTorch's fused operation. On a CPU that operation takes a cheaper exponential
    and other partial sums, which puts the flow up to 0.004 px off the reference; so there the scores are computed chunk
    by chunk, in the reference's order of operations. The backward pass goes chunk by chunk on every device: in float32
    the gradients of the fused operation differ from run to run and take as long, or, when it is made to add up in one
    order, many times as long (docs/performance.md).

    Args:
        query: `[N, L, C]`.
        key: `[N, M, C]`.
        value: `[N, M, D]` with D ≤ C.

    Returns:
        `[N, L, D]`.
    """
    if torch.compiler.is_exporting():
        return fused_attention(query, key, value)
    out: Tensor = _attention(query, key, value)
    return out


def fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """`attention` as PyTorch's fused operation, without a mask: storing `[L, M]` is what it is there to avoid.

    `scale` is the factor of the scores, 1 / √C where it is left out.
    """
    narrower = query.shape[-1] - value.shape[-1]
    wide = F.pad(value, (0, narrower)) if narrower else value  # the fused kernels need values as wide as keys
    # One head: with three dimensions PyTorch takes none of its fused kernels.
    heads = query.unsqueeze(1), key.unsqueeze(1), wide.unsqueeze(1)
    one_head = F.scaled_dot_product_attention(*heads, scale=scale).squeeze(1)
    return one_head[..., : value.shape[-1]] if narrower else one_head


def runs_eagerly_on_cpu(device: torch.device) -> bool:
    """Whether this runs on a CPU and is not being exported.

    Attention then goes chunk by chunk, in the reference's order of sums where that is asked for.
    """
    return device.type == "cpu" and not torch.compiler.is_exporting()


def cuts_windows(device: torch.device, *, any_order: bool) -> bool:
    """Whether windows that wrap around the border are cut into their regions, so that no window needs a mask.

    Cut windows have fewer scores, and their attention can be PyTorch's fused operation. That takes no mask, and in 16
    bits it is more exact, because it does not round the scores (docs/performance.md). Windows stay whole in two cases:
    in float32 on a CPU where sums must be in the reference's order (not `any_order`), and when exporting.
    """
    whole = runs_eagerly_on_cpu(device) and not any_order and not torch.is_autocast_enabled("cpu")
    return not (whole or torch.compiler.is_exporting())


def chunk_size(queries: int, keys: int, device: torch.device) -> tuple[int, int]:
    """How many windows, and how many queries of each window, are attended at a time.

    On a CPU these have at most `SCORES` scores, or are at most `ROWS` queries. The number of whole windows is one that
    the threads of the moment can share evenly: a product of five windows takes two threads as long as one of six. A
    window that is divided is divided into parts of nearly one size, not into full parts and a small rest.
    """
    if not runs_eagerly_on_cpu(device):
        return max(1, ACCELERATOR_SCORES // (queries * keys)), min(queries, max(1, ACCELERATOR_SCORES // keys))
    many = min(SCORES // (queries * keys), max(1, TOKENS // queries))
    if many > 1:
        threads = torch.get_num_threads()
        return max(many - many % threads, min(many, threads)), queries
    parts = -(-queries // max(ROWS, SCORES // keys))
    return 1, -(-queries // parts)


def row_slices(queries: int, rows: int) -> list[slice]:
    """The queries of a window, in slices of `rows`."""
    return [slice(row, min(row + rows, queries)) for row in range(0, queries, rows)]


def _chunks(windows: int, queries: int, keys: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of windows and of their queries, to be attended in turn."""
    many, rows = chunk_size(queries, keys, device)
    for window in range(0, windows, many):
        for part in row_slices(queries, rows):
            yield slice(window, min(window + many, windows)), part


class Crossing(NamedTuple):
    """The mask of windows that wrap around the border: penalties for pairs of tokens from different regions."""

    regions: Tensor
    """Region of each token, `[L]`."""
    penalties: Tensor
    """What is added to the scores of a query with every key, by the query's region: `[4, L]`."""

    @classmethod
    def of(cls, regions: Tensor) -> Crossing:
        """For windows whose tokens `[L]` lie in these regions."""
        apart = torch.arange(4, device=regions.device)[:, None] != regions
        return cls(regions, apart.float() * CROSSING_PENALTY)


def softmax_weights(
    query: Tensor, key: Tensor, scale: float, scratch: Scratch, crossing: Crossing | None = None, rows: slice = ALL
) -> Tensor:
    """`[n, l, M]`: softmax of scale · query · key; queries `[n, l, C]` are `rows` of windows, keys `[n, M, C]`."""
    scores = torch.bmm(query, key.transpose(1, 2), out=scratch.view(*query.shape[:2], key.shape[1]))
    if scale != 1.0:
        scores.div_(1 / scale)  # the reference's order: divided after the product
    if crossing is not None:
        scores.add_(crossing.penalties[crossing.regions[rows]])
    return torch.softmax(scores, dim=-1, out=scores)


class _Attention(torch.autograd.Function):
    """The forward pass is fused or goes chunk by chunk (see `attention`); the backward pass goes chunk by chunk.

    The backward pass computes the scores again. So nothing depends on whether its chunks are those of the forward pass,
    which they need not be: their size depends on the number of threads.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        if not runs_eagerly_on_cpu(query.device):
            return fused_attention(query, key, value)
        out = value.new_empty(*query.shape[:2], value.shape[-1])
        scratch = Scratch(query)
        scale = query.shape[-1] ** -0.5
        for windows, rows in _chunks(len(query), query.shape[1], key.shape[1], query.device):
            weights = softmax_weights(query[windows, rows], key[windows], scale, scratch)
            # Transposed: values of two columns, flow or positions, are a slow product as a right-hand side.
            mixed = torch.bmm(value[windows].transpose(1, 2), weights.transpose(1, 2))  # [n, D, l]
            out[windows, rows] = mixed.transpose(1, 2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        to_query, to_key = torch.empty_like(query), torch.zeros_like(key)
        to_value = torch.zeros_like(value) if ctx.needs_input_grad[2] else None
        scratch, upper_scratch = Scratch(query), Scratch(query)
        scale = query.shape[-1] ** -0.5
        for windows, rows in _chunks(len(query), query.shape[1], key.shape[1], query.device):
            part, upper = query[windows, rows], gradient[windows, rows]
            weights = softmax_weights(part, key[windows], scale, scratch)
            if to_value is not None:
                to_value[windows].baddbmm_(weights.transpose(1, 2), upper)
            to_weights = torch.bmm(upper, value[windows].transpose(1, 2), out=upper_scratch.view(*weights.shape))
            to_scores = softmax_backward(to_weights, weights)
            to_query[windows, rows] = torch.bmm(to_scores, key[windows]).mul_(scale)
            to_key[windows].baddbmm_(to_scores.transpose(1, 2), part, alpha=scale)
        return to_query, to_key, to_value


def softmax_backward(to_weights: Tensor, weights: Tensor) -> Tensor:
    """From the gradient of softmax `weights` to that of their scores, in place: in the memory of `to_weights`."""
    found: Tensor = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype, grad_input=to_weights)
    return found


_attention = outside_graphs(_Attention.apply)


def neighbourhood_attention(query: Tensor, key: Tensor, value: Tensor, radius: int, *, exclude_outside: bool) -> Tensor:
    """Every query attends to the (2·radius+1)² keys around it.

    Tiles of queries meet the tiles of keys they can reach in one batched product; pairs further apart than the
    radius are excluded from its softmax. That computes more scores than needed, and is still far cheaper than
    gathering each query's neighbours.

    Args:
        query: `[B, h, w, C]`.
        key: `[B, h, w, C]`.
        value: `[B, h, w, D]`.
        radius: at least 1.
        exclude_outside: leave neighbours outside the map out of the softmax; otherwise they take part in it with a
            zero key and a zero value.

    Returns:
        `[B, h, w, D]`.
    """
    batch, height, width, channels = query.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    reach = TILE + 2 * radius
    fill = (0, 0, 0, columns * TILE - width, 0, rows * TILE - height)
    border = (0, 0, radius, radius + fill[3], radius, radius + fill[5])
    query, key, value = F.pad(query, fill), F.pad(key, border), F.pad(value, border)
    beyond = _beyond_radius(radius, reach, query.device).to(query.dtype)  # [TILE², reach²]
    inside = F.pad(query.new_ones(1, height, width, 1), border) if exclude_outside else None

    strips: list[Tensor] = []
    for start, length in _strips(rows, max(1, STRIP // (batch * columns * TILE**2 * reach**2))):
        own = slice(start * TILE, (start + length) * TILE)
        reached = slice(own.start, own.stop + 2 * radius)
        queries = query[:, own].reshape(batch, -1, TILE, columns, TILE, channels)
        queries = queries.transpose(2, 3).reshape(-1, TILE**2, channels)  # [B*tiles, TILE², C]
        excluded = beyond.expand(queries.shape[0], -1, -1)  # [B*tiles, TILE², reach²]
        if inside is not None:
            outside = 1 - _overlapping_tiles(inside[:, reached], reach).transpose(1, 2)  # [tiles, 1, reach²]
            excluded = excluded + outside.repeat(batch, 1, 1)
        keys = _overlapping_tiles(key[:, reached], reach).transpose(1, 2)  # [B*tiles, C, reach²]
        scores = torch.baddbmm(excluded, queries, keys, beta=EXCLUDED, alpha=channels**-0.5)
        out = scores.softmax(dim=-1) @ _overlapping_tiles(value[:, reached], reach)  # [B*tiles, TILE², D]
        out = out.view(batch, -1, columns, TILE, TILE, value.shape[-1]).transpose(2, 3)
        strips.append(out.reshape(batch, -1, columns * TILE, value.shape[-1]))
    return torch.cat(strips, dim=1)[:, :height, :width]


def _strips(rows: int, longest: int) -> list[tuple[int, int]]:
    """First row and length of strips of tiles. When exporting there is one strip: the graph must fit every size."""
    if torch.compiler.is_exporting():
        return [(0, rows)]
    return [(start, min(longest, rows - start)) for start in range(0, rows, longest)]


def _overlapping_tiles(padded: Tensor, reach: int) -> Tensor:
    """`[B, rows*TILE+2r, columns*TILE+2r, D]` → one tile of reach² pixels a query tile: `[B*tiles, reach², D]`."""
    tiles = padded.unfold(1, reach, TILE).unfold(2, reach, TILE)  # [B, rows, columns, D, reach, reach]
    return tiles.permute(0, 1, 2, 4, 5, 3).reshape(-1, reach * reach, padded.shape[-1])


def _beyond_radius(radius: int, reach: int, device: torch.device) -> Tensor:
    """1 where a query of a tile and a key of its reach are more than `radius` apart: float `[TILE², reach²]`."""
    own = torch.arange(TILE, device=device) + radius
    apart = (own[:, None] - torch.arange(reach, device=device)).abs() > radius  # [TILE, reach]
    either = apart[:, None, :, None] | apart[None, :, None, :]  # [TILE y, TILE x, reach y, reach x]
    return either.reshape(TILE * TILE, reach * reach).float()
