"""GMFlow once more, as plainly as it can be written: whole score matrices, masks, gathers. Slow and obviously right.

The fast paths are compared with it. It shares nothing with the library but the names of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow import GMFlowConfig

Parameters = Mapping[str, Tensor]


def predictions(
    parameters: Parameters,
    config: GMFlowConfig,
    image0: Tensor,
    image1: Tensor,
    *,
    training: bool = False,
    bidirectional: bool = False,
) -> list[Tensor]:
    """Every supervised prediction (training), or the final one alone; bidirectional in one batch of 2B."""
    p = parameters
    strides = (8, 4)[: config.num_scales]
    scales = [features.chunk(2) for features in backbone(p, torch.cat([image0, image1]), config.num_scales)]
    result: list[Tensor] = []
    flow: Tensor | None = None
    for scale, (feature0, feature1) in enumerate(scales):
        if bidirectional and scale > 0:
            feature0, feature1 = torch.cat([feature0, feature1]), torch.cat([feature1, feature0])
        if flow is not None:
            flow = 2 * F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=True)
            flow = flow.detach()
            feature1 = sample(feature1, grid_like(feature1) + flow)
        feature0, feature1 = transformer(p, config.num_layers, feature0, feature1, config.attn_splits[scale])
        if bidirectional and scale == 0:
            feature0, feature1 = torch.cat([feature0, feature1]), torch.cat([feature1, feature0])
        radius = config.corr_radius[scale]
        matched = match_globally(feature0, feature1) if radius == -1 else match_locally(feature0, feature1, radius)
        flow = matched if flow is None else flow + matched
        if training:
            result.append(bilinear(flow, strides[scale]))
        radius = config.prop_radius[scale]
        propagate = propagate_globally if radius == -1 else propagate_locally
        flow = propagate(p, feature0, flow.detach(), radius)
        if scale == config.num_scales - 1:
            result.append(upsample(p, flow, feature0, strides[scale]))
        elif training:
            result.append(bilinear(flow, strides[scale]))
    return result


def backbone(p: Parameters, images: Tensor, num_scales: int) -> list[Tensor]:
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=images.dtype).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=images.dtype).view(1, 3, 1, 1)
    x = (images / 255.0 - mean) / std
    x = F.instance_norm(F.conv2d(x, p["backbone.stem.weight"], stride=2, padding=3)).relu()
    for stage, stride in enumerate((1, 2, 2 if num_scales == 1 else 1)):
        x = residual_block(p, f"backbone.stages.{stage}.0", x, stride)
        x = residual_block(p, f"backbone.stages.{stage}.1", x, 1)
    x = F.conv2d(x, p["backbone.projection.weight"], p["backbone.projection.bias"])
    if num_scales == 1:
        return [x]
    shared = p["backbone.shared.weight"]
    return [F.conv2d(x, shared, stride=2, padding=1), F.conv2d(x, shared, padding=1)]


def residual_block(p: Parameters, name: str, x: Tensor, stride: int) -> Tensor:
    y = F.instance_norm(F.conv2d(x, p[f"{name}.conv1.weight"], stride=stride, padding=1)).relu()
    y = F.instance_norm(F.conv2d(y, p[f"{name}.conv2.weight"], padding=1)).relu()
    if f"{name}.shortcut.weight" in p:
        shortcut = F.conv2d(x, p[f"{name}.shortcut.weight"], p[f"{name}.shortcut.bias"], stride=stride)
        x = F.instance_norm(shortcut)
    return (x + y).relu()


def position(height: int, width: int, channels: int, dtype: torch.dtype) -> Tensor:
    """`[channels, height, width]`, one value at a time in the head, all at once in the code."""
    half = channels // 2
    y = torch.arange(1, height + 1).view(1, -1, 1) / (height + 1e-6) * 2 * math.pi
    x = torch.arange(1, width + 1).view(1, 1, -1) / (width + 1e-6) * 2 * math.pi
    index = torch.arange(half).view(-1, 1, 1)
    period = 10000 ** (2 * (index // 2) / half)
    waves = [
        torch.where(index % 2 == 0, (c / period).sin(), (c / period).cos()).expand(half, height, width) for c in (y, x)
    ]
    return torch.cat(waves).to(dtype)


def transformer(p: Parameters, layers: int, feature0: Tensor, feature1: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = feature0.shape
    window = (height // splits, width // splits)
    code = position(*window, channels, feature0.dtype).repeat(1, splits, splits)
    tokens = torch.cat([feature0 + code, feature1 + code]).permute(0, 2, 3, 1)  # [2B, h, w, C]
    for layer in range(layers):
        name = f"transformer.blocks.{layer}"
        shifted = splits > 1 and layer % 2 == 1
        target = torch.cat([tokens[batch:], tokens[:batch]])
        tokens = tokens + attention_layer(p, f"{name}.self_attention", tokens, tokens, splits, shifted)
        message = attention_layer(p, f"{name}.cross_attention", tokens, target, splits, shifted)
        hidden = F.gelu(F.linear(torch.cat([tokens, message], -1), p[f"{name}.feed_forward.expand.weight"]))
        message = F.linear(hidden, p[f"{name}.feed_forward.contract.weight"])
        tokens = tokens + layer_norm(p, f"{name}.feed_forward.norm", message)
    tokens = tokens.permute(0, 3, 1, 2)
    return tokens[:batch], tokens[batch:]


def layer_norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def attention_layer(p: Parameters, name: str, source: Tensor, target: Tensor, splits: int, shifted: bool) -> Tensor:
    query = F.linear(source, p[f"{name}.query.weight"])
    key = F.linear(target, p[f"{name}.key.weight"])
    value = F.linear(target, p[f"{name}.value.weight"])
    attended = window_attention(query, key, value, splits, shifted)
    return layer_norm(p, f"{name}.norm", F.linear(attended, p[f"{name}.merge.weight"]))


def window_attention(query: Tensor, key: Tensor, value: Tensor, splits: int, shifted: bool) -> Tensor:
    """`[N, h, w, C]` each; cyclic shift and a penalty of 100 for pairs that it brought together."""
    maps, height, width, channels = query.shape
    wh, ww = height // splits, width // splits
    shift = (wh // 2, ww // 2) if shifted else (0, 0)

    def windows(x: Tensor) -> Tensor:  # [N, K², wh*ww, C]
        x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2)).view(maps, splits, wh, splits, ww, -1)
        return x.transpose(2, 3).reshape(maps, splits**2, wh * ww, -1)

    scores = windows(query) @ windows(key).transpose(-1, -2) / channels**0.5
    # Which strip a pixel comes from: 1 for those that the roll carried around the border.
    region_y = (torch.arange(height) < shift[0]).long()
    region_x = (torch.arange(width) < shift[1]).long()
    region = windows((2 * region_y[:, None] + region_x).view(1, height, width, 1).expand(maps, -1, -1, -1))
    scores = scores - 100.0 * (region != region.transpose(-1, -2)).to(scores.dtype)
    out = (scores.softmax(-1) @ windows(value)).view(maps, splits, splits, wh, ww, channels)
    out = out.transpose(2, 3).reshape(maps, height, width, channels)
    return torch.roll(out, shift, dims=(1, 2))


def grid_like(x: Tensor) -> Tensor:
    """Pixel coordinates (x, y): `[1, 2, h, w]`."""
    height, width = x.shape[-2:]
    y, x_ = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x_, y])[None].to(x.dtype)


def sample(image: Tensor, target: Tensor) -> Tensor:
    """Bilinear, zeros outside: `[B, C, h, w]` at `[B, 2, h', w']`."""
    height, width = image.shape[-2:]
    x = 2 * target[:, 0] / max(width - 1, 1) - 1
    y = 2 * target[:, 1] / max(height - 1, 1) - 1
    return F.grid_sample(image, torch.stack([x, y], -1), align_corners=True)


def match_globally(feature0: Tensor, feature1: Tensor) -> Tensor:
    batch, channels, height, width = feature0.shape
    grid = grid_like(feature0)
    scores = feature0.flatten(2).transpose(1, 2) @ feature1.flatten(2) / channels**0.5
    expected = scores.softmax(-1) @ grid.flatten(2).transpose(1, 2)
    return expected.transpose(1, 2).view(batch, 2, height, width) - grid


def gather(x: Tensor, radius: int) -> Tensor:
    """The (2r+1)² neighbours of every pixel, zero outside: `[B, D, h, w]` → `[B, h*w, (2r+1)², D]`."""
    columns = F.unfold(x, 2 * radius + 1, padding=radius)
    return columns.view(x.shape[0], x.shape[1], -1, columns.shape[-1]).permute(0, 3, 2, 1)


def match_locally(feature0: Tensor, feature1: Tensor, radius: int) -> Tensor:
    batch, channels, height, width = feature0.shape
    query = feature0.flatten(2).transpose(1, 2).unsqueeze(2)  # [B, h*w, 1, C]
    scores = (query * gather(feature1, radius)).sum(-1) / channels**0.5
    outside = gather(torch.ones_like(feature0[:, :1]), radius).squeeze(-1) == 0
    weights = scores.masked_fill(outside, -1e9).softmax(-1).unsqueeze(-1)
    grid = grid_like(feature0)
    expected = (weights * gather(grid, radius)).sum(2)  # [B, h*w, 2]
    return expected.transpose(1, 2).view(batch, 2, height, width) - grid


def propagate_globally(p: Parameters, feature: Tensor, flow: Tensor, radius: int) -> Tensor:
    tokens = feature.flatten(2).transpose(1, 2)
    query = F.linear(tokens, p["propagation.query.weight"], p["propagation.query.bias"])
    key = F.linear(query, p["propagation.key.weight"], p["propagation.key.bias"])
    weights = (query @ key.transpose(1, 2) / feature.shape[1] ** 0.5).softmax(-1)
    return (weights @ flow.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(flow)


def propagate_locally(p: Parameters, feature: Tensor, flow: Tensor, radius: int) -> Tensor:
    tokens = feature.flatten(2).transpose(1, 2)
    query = F.linear(tokens, p["propagation.query.weight"], p["propagation.query.bias"])
    key = F.linear(tokens, p["propagation.key.weight"], p["propagation.key.bias"])
    keys = gather(key.transpose(1, 2).reshape(feature.shape), radius)  # [B, h*w, (2r+1)², C]
    weights = ((query.unsqueeze(2) * keys).sum(-1) / feature.shape[1] ** 0.5).softmax(-1)
    spread = (weights.unsqueeze(-1) * gather(flow, radius)).sum(2)
    return spread.transpose(1, 2).view_as(flow)


def bilinear(flow: Tensor, factor: int) -> Tensor:
    return factor * F.interpolate(flow, scale_factor=factor, mode="bilinear", align_corners=True)


def upsample(p: Parameters, flow: Tensor, feature: Tensor, factor: int) -> Tensor:
    batch, _, height, width = flow.shape
    x = torch.cat([flow, feature], 1)
    x = F.conv2d(x, p["upsampler.hidden.weight"], p["upsampler.hidden.bias"], padding=1).relu()
    logits = F.conv2d(x, p["upsampler.weights.weight"], p["upsampler.weights.bias"])
    weights = logits.view(batch, 1, 9, factor, factor, height, width).softmax(2)
    neighbours = F.unfold(factor * flow, 3, padding=1).view(batch, 2, 9, 1, 1, height, width)
    fine = (weights * neighbours).sum(2)  # [B, 2, s, s, h, w]
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, factor * height, factor * width)
