"""Features of both images made comparable by self- and cross-attention (paper, "Feature Enhancement").

Shape legend: T = 2·B·h·w tokens of both images in window order, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmflow.attention import cuts_windows
from gmflow.config import GMFlowConfig
from gmflow.feedforward import feed_forward
from gmflow.position import position_encoding
from gmflow.summation import SummationOrder
from gmflow.window_attention import window_attention
from gmflow.window_chunks import AttentionWeights, Pairing
from gmflow.windows import WindowGrid, WindowGroup, permute_tokens, window_grid


class FeatureTransformer(nn.Module):
    """Blocks of self- and cross-attention with feed-forward, shared by all scales.

    Attributes:
        summation: in which order it adds up; see `SummationOrder`.
    """

    def __init__(self, config: GMFlowConfig) -> None:
        super().__init__()
        self.summation = SummationOrder.REFERENCE
        self.blocks = nn.ModuleList(
            TransformerBlock(config.feature_channels, config.ffn_expansion) for _ in range(config.num_layers)
        )

    def forward(self, feature0: Tensor, feature1: Tensor, splits: int) -> tuple[Tensor, Tensor]:
        """Features `[B, h, w, C]` of both images → the same, each aware of the other.

        Attention stays inside `splits` × `splits` windows, moved by half a window in every second block; with one
        split it spans the map and nothing is moved.
        """
        batch, height, width, channels = feature0.shape
        tokens = torch.cat([feature0, feature1])  # [2B, h, w, C]
        window = (height // splits, width // splits)
        position = position_encoding(*window, channels, tokens.device)
        tokens = (tokens.view(-1, splits, window[0], splits, window[1], channels) + position[:, None]).view(
            -1, channels
        )

        cut = cuts_windows(tokens.device, any_order=self.summation.is_free(tokens.device))
        grids = [
            window_grid(2 * batch, height, width, splits, shifted=shifted, cut=cut, device=tokens.device)
            for shifted in ((False, True) if splits > 1 else (False,))
        ]
        tokens = permute_tokens(tokens, grids[0].order, grids[0].inverse)  # [T, C]
        current = grids[0]
        for index, block in enumerate(self.blocks):
            grid = grids[index % len(grids)]
            tokens = block(_regrid(tokens, current, grid), grid.groups)
            current = grid
        tokens = permute_tokens(tokens, current.inverse, current.order)
        aware0, aware1 = tokens.view(2, batch, height, width, channels).unbind(0)
        return aware0, aware1


def _regrid(tokens: Tensor, current: WindowGrid, wanted: WindowGrid) -> Tensor:
    if current is wanted:
        return tokens
    return permute_tokens(tokens, current.inverse[wanted.order], wanted.inverse[current.order])


class TransformerBlock(nn.Module):
    """Self-attention, then cross-attention to the other image as it was before the block, then feed-forward."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.self_attention = AttentionLayer(channels)
        self.cross_attention = AttentionLayer(channels)
        self.feed_forward = FeedForward(channels, expansion)

    def forward(self, tokens: Tensor, groups: tuple[WindowGroup, ...]) -> Tensor:
        """Tokens `[T, C]` in window order → the same; `groups` are those of their `WindowGrid`."""
        source = self.self_attention(tokens, tokens, groups, cross=False, onto_source=True)
        message = self.cross_attention(source, tokens, groups, cross=True, onto_source=False)
        updated: Tensor = self.feed_forward(source, message)
        return updated


class AttentionLayer(nn.Module):
    """LayerNorm(merge(single-head attention)) inside windows.

    Attributes:
        summation: in which order it adds up; see `SummationOrder`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.summation = SummationOrder.REFERENCE
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.merge = nn.Linear(channels, channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        _xavier(self)

    def forward(
        self, source: Tensor, target: Tensor, groups: tuple[WindowGroup, ...], *, cross: bool, onto_source: bool
    ) -> Tensor:
        """Messages `[T, C]` to `source` `[T, C]` from the same windows of `target` `[T, C]`.

        With `cross`, from those of the other image; with `onto_source`, added to `source`.
        """
        weights = AttentionWeights(
            self.query.weight, self.key.weight, self.value.weight, self.merge.weight, self.norm.weight, self.norm.bias
        )
        return window_attention(
            source,
            target,
            weights,
            _pairings(groups, cross=cross),
            onto_source=onto_source,
            any_order=self.summation.is_free(source.device),
        )


def _pairings(groups: tuple[WindowGroup, ...], *, cross: bool) -> list[Pairing]:
    """Which windows attend to which: to themselves, or to the same window of the other image."""
    pairings: list[Pairing] = []
    start = 0
    for group in groups:
        size, number = group.windows * group.length, len(pairings)
        if cross:  # windows of image 0 come first
            half, middle = group.windows // 2, start + size // 2
            pairings.append(Pairing(start, number + 1, half, group.length, group.regions))
            pairings.append(Pairing(middle, number, half, group.length, group.regions))
        else:
            pairings.append(Pairing(start, number, group.windows, group.length, group.regions))
        start += size
    return pairings


class FeedForward(nn.Module):
    """source + LayerNorm(W2 · GELU(W1 · [source, message])).

    Attributes:
        summation: in which order it adds up; see `SummationOrder`.
    """

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.summation = SummationOrder.REFERENCE
        self.expand = nn.Linear(2 * channels, 2 * channels * expansion, bias=False)
        self.contract = nn.Linear(2 * channels * expansion, channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        _xavier(self)

    def forward(self, source: Tensor, message: Tensor) -> Tensor:
        """Tokens and the messages to them, `[T, C]` each → tokens `[T, C]`."""
        weights = self.expand.weight, self.contract.weight, self.norm.weight, self.norm.bias
        return feed_forward(source, message, *weights, any_order=self.summation.is_free(source.device))


def _xavier(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
