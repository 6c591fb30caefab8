"""The benchmarks' error measures, pooled over every valid pixel of a set."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from gmflow.errors import GMFlowError
from gmflow.geometry import vector_length

_WAUC_THRESHOLDS = 100
"""Number of thresholds of the weighted area under the curve (VIPER, Spring).

They are at every 0.05 px up to 5 px and have the weights 1, 0.99, … 0.01.
"""


class ErrorMetrics:
    """End-point error and outliers, as sums that add up over batches and ranks: cheap enough for every training step.

    ```python
    metrics = ErrorMetrics()
    metrics.update(flow, target, valid)            # every batch
    total = metrics.state(); all_reduce(total)     # sums: any number of ranks
    print(ErrorMetrics.from_state(total).compute())
    ```
    """

    SUMS: ClassVar[tuple[str, ...]] = ("pixels", "epe", "px1", "px3", "px5")

    def __init__(self) -> None:
        self._sums = torch.zeros(len(self.SUMS), dtype=torch.float64)

    @torch.no_grad()
    def update(self, flow: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            flow: prediction `[B, 2, H, W]`, pixels.
            target: ground truth `[B, 2, H, W]`, pixels; where it is not finite it counts as not valid.
            valid: bool `[B, H, W]`.

        Raises:
            GMFlowError: the shapes do not fit together.
        """
        _check_shapes(flow, target, valid)
        self._add(_error_sums(*_errors(flow, target, valid)))

    def _add(self, sums: list[Tensor]) -> None:
        found = torch.stack(sums)
        self._sums = self._sums.to(found.device) + found

    def state(self) -> Tensor:
        """All sums as a 1-D float64 tensor (a copy): states of ranks and of batches may be added up."""
        return self._sums.clone()

    @classmethod
    def from_state(cls, state: Tensor) -> Self:
        """Metrics with these sums.

        Raises:
            GMFlowError: `state` does not come from `state()`.
        """
        if state.shape != (len(cls.SUMS),):
            raise GMFlowError(f"a metrics state has shape [{len(cls.SUMS)}], not {list(state.shape)}")
        metrics = cls()
        metrics._sums = state.detach().to(torch.float64, copy=True)
        return metrics

    def merge(self, other: Self) -> None:
        """Add the sums of other metrics to these."""
        self._sums = self._sums + other._sums.to(self._sums.device)

    def compute(self) -> dict[str, float]:
        """The figures over everything added so far.

        Returns:
            `epe`: mean end-point error in pixels; `px1`, `px3`, `px5`: **percent** of pixels with an error over 1, 3
            and 5 px. A figure without a single pixel is NaN. A prediction that is not finite makes the means that it
            belongs to NaN or inf, and counts as an outlier.
        """
        sums = self._named()
        figures = {"epe": _ratio(sums["epe"], sums["pixels"])}
        return figures | {name: 100 * _ratio(sums[name], sums["pixels"]) for name in ("px1", "px3", "px5")}

    def _named(self) -> dict[str, float]:
        return dict(zip(self.SUMS, self._sums.tolist(), strict=True))


class FlowMetrics(ErrorMetrics):
    """All the benchmarks' figures, as sums that add up over batches and ranks."""

    SUMS = (
        *ErrorMetrics.SUMS,
        *("f1_all", "s0_10_pixels", "s0_10", "s10_40_pixels", "s10_40", "s40_plus_pixels", "s40_plus"),
        *("matched_pixels", "matched", "unmatched_pixels", "unmatched"),
        *("images", "epe_per_image", "images_with_occlusion", "wauc"),
    )

    @torch.no_grad()
    def update(self, flow: Tensor, target: Tensor, valid: Tensor, occluded: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            flow: prediction `[B, 2, H, W]`, pixels.
            target: ground truth `[B, 2, H, W]`, pixels; where it is not finite it counts as not valid.
            valid: bool `[B, H, W]`.
            occluded: bool `[B, H, W]`, true = hidden in image 1; pixels that leave the image count as unmatched too.

        Raises:
            GMFlowError: the shapes do not fit together.
        """
        _check_shapes(flow, target, valid, occluded)
        error, valid = _errors(flow, target, valid)
        target = torch.where(valid.unsqueeze(1), target, 0.0).double()
        speed = vector_length(target)
        flat = error.flatten()

        sums = _error_sums(error, valid)
        finite = bool(sums[1].isfinite())

        def count_and_total(where: Tensor) -> list[Tensor]:
            mask = where.flatten().double()
            # The product is faster, but 0 · NaN is NaN: of an error that is not finite it would pass into every sum.
            return [mask.sum(), torch.dot(mask, flat) if finite else error[where].sum()]

        pixels = valid.flatten(1).sum(dim=1)  # [B]
        per_image = error.flatten(1).sum(dim=1) / pixels.clamp(min=1)
        nothing = flat.new_zeros(())
        slow, fast = valid & (speed < 10), speed > 40
        sums += [(_over(error, 3) & _over(error, 0.05 * speed)).sum().double()]
        for where in (slow, valid & ~slow & ~fast, fast):
            sums += count_and_total(where)
        if occluded is None:
            sums += [nothing] * 4
        else:
            unmatched = occluded.bool() | _leaves_image(target)
            sums += [*count_and_total(valid & ~unmatched), *count_and_total(valid & unmatched)]
        sums += [(pixels > 0).sum().double(), per_image.sum()]
        sums += [
            nothing if occluded is None else nothing + len(flow),
            torch.dot(valid.flatten().double(), _passed_weight(flat if finite else flat.nan_to_num(nan=torch.inf))),
        ]
        self._add(sums)

    def compute(self) -> dict[str, float]:
        """The figures over everything added so far.

        Returns:
            Those of `ErrorMetrics`; `s0_10`, `s10_40`, `s40_plus`: EPE where the true speed is below 10, 10 to 40 and
            over 40 px; `f1_all`: **percent** of pixels with an error over 3 px and over 5 % of the speed (KITTI);
            `wauc`: **percent**, 100 is perfect: the shares of pixels with an error of at most 0.05, 0.10, … 5 px,
            averaged with weights 1, 0.99, … 0.01 (VIPER, Spring);
            `epe_per_image`: the mean of the images' EPEs; and, if any image came with its occlusion, `matched` and
            `unmatched`: EPE of pixels visible and not visible in image 1. A figure without a single pixel is NaN. A
            prediction that is not finite makes the means that it belongs to NaN or inf, and counts as an outlier and,
            in `wauc`, as an error over 5 px.
        """
        sums = self._named()
        figures = super().compute() | {"f1_all": 100 * _ratio(sums["f1_all"], sums["pixels"])}
        bins = ["s0_10", "s10_40", "s40_plus"]
        if sums["images_with_occlusion"]:
            bins += ["matched", "unmatched"]
        figures |= {name: _ratio(sums[name], sums[f"{name}_pixels"]) for name in bins}
        whole = _WAUC_THRESHOLDS * (_WAUC_THRESHOLDS + 1) / 2
        figures["wauc"] = 100 * _ratio(sums["wauc"], sums["pixels"] * whole)
        figures["epe_per_image"] = _ratio(sums["epe_per_image"], sums["images"])
        return figures


def _errors(flow: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """End-point errors, 0 where there is no ground truth (so sums need no mask), float64 `[B, H, W]`.

    And where there is ground truth, bool `[B, H, W]`.
    """
    x, y = target.unbind(1)
    valid = valid.bool() & (x.isfinite() & y.isfinite())
    return torch.where(valid, vector_length(flow.double() - target), 0.0), valid


def _error_sums(error: Tensor, valid: Tensor) -> list[Tensor]:
    """The sums of `ErrorMetrics.SUMS`, in that order."""
    return [valid.sum().double(), error.sum(), *(_over(error, limit).sum().double() for limit in (1, 3, 5))]


def _over(error: Tensor, limit: float | Tensor) -> Tensor:
    """Where errors are over a limit, or NaN: a prediction that is not a number is wrong."""
    return ~(error <= limit)


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")


def _passed_weight(error: Tensor) -> Tensor:
    """For each error, the sum of the weights of the WAUC thresholds that it passes, in hundredths: whole numbers."""
    missed = (20 * error).ceil_().sub_(1).clamp_(0, _WAUC_THRESHOLDS)  # thresholds below the error
    passed = _WAUC_THRESHOLDS - missed
    return passed * (passed + 1) / 2


def _leaves_image(flow: Tensor) -> Tensor:
    """Pixels whose flow `[B, 2, H, W]` ends outside the image: bool `[B, H, W]`."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device).unsqueeze(1) + flow[:, 1]
    return (x < 0) | (x > width - 1) | (y < 0) | (y > height - 1)


def _check_shapes(flow: Tensor, target: Tensor, valid: Tensor, occluded: Tensor | None = None) -> None:
    pixels = (*flow.shape[:1], *flow.shape[2:])
    masks = [valid] if occluded is None else [valid, occluded]
    if flow.dim() != 4 or flow.shape[1] != 2 or target.shape != flow.shape or any(m.shape != pixels for m in masks):
        shapes = ", ".join(str(list(t.shape)) for t in (flow, target, *masks))
        raise GMFlowError(f"metrics need flow and target [B, 2, H, W] and masks [B, H, W], not {shapes}")
