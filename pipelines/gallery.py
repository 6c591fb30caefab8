"""Pairs to look at: the worst of a set and some spread over it, small enough to fit into one HTML file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import numpy.typing as npt

from datasets_etl.inspection import spread
from gmflow import error_to_image, flow_to_image
from gmflow.drawing import warp_frame
from pipelines.training.pictures import coloured_truth
from pipelines.training.validation import Scored

_WIDTH = 512
_QUALITY = 80

# What a card shows, in this order.
FRAME0, FRAME1, WARPED, TRUTH, PREDICTION, ERROR = (
    "frame 0",
    "frame 1",
    "frame 1 warped",
    "truth",
    "prediction",
    "error",
)
OCCLUSION, OCCLUSION_FOUND = "occlusion", "occlusion found"


@dataclass(frozen=True)
class Card:
    """A pair with its figures and pictures.

    Attributes:
        set: name of the pair's set.
        key: key of the sample.
        scene: the sequence it is from.
        figures: metrics of this pair alone, named as in `FlowMetrics.compute`.
        pictures: name → WebP of at most 512 pixels in width.
        worst: whether its error is one of the largest of the set; others were chosen for their position in it.
    """

    set: str
    key: str
    scene: str
    figures: dict[str, float]
    pictures: dict[str, bytes]
    worst: bool = False


@dataclass
class Gallery:
    """Collects cards, one scored pair after the other. Two galleries of a set can be joined in any order.

    Attributes:
        set: name of the set.
        regular: numbers of the samples that are kept whatever their error.
        worst: how many of the other samples are kept, those with the largest EPE.
    """

    set: str
    regular: frozenset[int]
    worst: int
    _regular: dict[int, Card] = field(default_factory=dict)
    _worst: dict[int, Card] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, samples: int, pairs: int) -> "Gallery":
        """A gallery of up to `pairs` cards for a set of `samples`: half are the worst ones, half are spread evenly."""
        return cls(name, frozenset(spread(list(range(samples)), pairs - pairs // 2)), pairs // 2)

    def offer(self, number: int, scored: Scored) -> None:
        """Keep a card of sample `number` of the set, if it is to be shown."""
        figures = scored.metrics.compute()
        if number in self.regular:
            self._regular[number] = self._card(scored, figures)
        elif self._is_among_the_worst(number, figures):
            self._worst[number] = self._card(scored, figures)
            self._trim()

    def join(self, other: "Gallery") -> None:
        """Take over the cards of another part of the same set."""
        self._regular |= other._regular
        self._worst |= other._worst
        self._trim()

    def cards(self) -> list[Card]:
        """All cards, largest error first; as many of them as are kept for their error are marked as the worst."""
        kept = self._regular | self._worst
        order = sorted(kept, key=lambda number: (badness(kept[number].figures), number), reverse=True)
        return [replace(kept[number], worst=rank < self.worst) for rank, number in enumerate(order)]

    def _is_among_the_worst(self, number: int, figures: Mapping[str, float]) -> bool:
        if len(self._worst) < self.worst:
            return True
        return self.worst > 0 and (badness(figures), number) > min(map(self._rank, self._worst))

    def _trim(self) -> None:
        order = sorted(self._worst, key=self._rank, reverse=True)
        self._worst = {number: self._worst[number] for number in order[: self.worst]}

    def _rank(self, number: int) -> tuple[float, int]:
        """Of two equal errors the later one ranks as worse, so that the cards do not depend on how a set is divided."""
        return badness(self._worst[number].figures), number

    def _card(self, scored: Scored, figures: dict[str, float]) -> Card:
        return Card(self.set, scored.sample.key, scored.sample.scene, figures, card_pictures(scored))


def badness(figures: Mapping[str, float]) -> float:
    """The EPE of a pair or a scene; infinite if its prediction is not finite, and -1 without a valid pixel."""
    if math.isfinite(figures["epe"]):
        return figures["epe"]
    return math.inf if math.isfinite(figures["px1"]) else -1.0  # what is not finite counts as an outlier


def card_pictures(scored: Scored) -> dict[str, bytes]:
    """Name → WebP. Truth and prediction are coloured on the truth's scale, and sparse truth stays visible."""
    sample, flow = scored.sample, scored.flow.numpy().transpose(1, 2, 0)
    if sample.flow is None or sample.valid is None:
        raise ValueError(f"{sample.key} has no ground truth to compare with")
    truth, fastest = coloured_truth(sample.flow, sample.valid)
    smooth = {
        FRAME0: sample.image0,
        FRAME1: sample.image1,
        WARPED: warp_frame(sample.image1, flow),
        PREDICTION: flow_to_image(flow, max_flow=fastest),
    }
    exact = {TRUTH: truth, ERROR: error_to_image(flow, sample.flow, sample.valid)}
    for name, mask in ((OCCLUSION, sample.occluded), (OCCLUSION_FOUND, scored.occluded)):
        if mask is not None:
            exact[name] = _mask_picture(np.asarray(mask))
    order = (FRAME0, FRAME1, WARPED, TRUTH, PREDICTION, ERROR, OCCLUSION, OCCLUSION_FOUND)
    small = {name: _webp(image, grow=False) for name, image in smooth.items()}
    small |= {name: _webp(image, grow=sample.sparse and name in (TRUTH, ERROR)) for name, image in exact.items()}
    return {name: small[name] for name in order if name in small}


def _mask_picture(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    return np.repeat((mask.astype(np.uint8) * 255)[..., None], 3, axis=2)


def _webp(image: npt.NDArray[np.uint8], *, grow: bool) -> bytes:
    """Encode a picture. With `grow`, sparse points are enlarged first; shrinking would lose or darken them."""
    height, width = image.shape[:2]
    if grow:
        image = _grown(image)
    if width > _WIDTH:
        way = cv2.INTER_NEAREST if grow else cv2.INTER_AREA
        image = cv2.resize(image, (_WIDTH, max(1, round(height * _WIDTH / width))), interpolation=way)
    done, data = cv2.imencode(".webp", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, _QUALITY])
    if not done:
        raise RuntimeError(f"OpenCV could not write a WebP of {image.shape}")
    return bytes(data)


def _grown(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Black pixels take the colour of a neighbour that is not black."""
    height, width = image.shape[:2]
    framed = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    grown = image.copy()
    for y, x in ((1, 0), (1, 2), (0, 1), (2, 1), (0, 0), (0, 2), (2, 0), (2, 2)):
        black = ~grown.any(axis=2)
        grown[black] = framed[y : y + height, x : x + width][black]
    return grown
