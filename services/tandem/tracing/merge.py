"""Makes one timeline of what several processes recorded. Pure.

Three things differ between processes: their clocks, the names that they know a request by, and
which half of a transfer they saw.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from tandem.timeline.events import Iteration, Stage, Timeline, Transfer
from tandem.tracing.buffer import (
    Event,
    IterationEvent,
    LandedEvent,
    LegEvent,
    PieceRef,
    SentEvent,
    StageEvent,
)

_STAMP = re.compile(r"~[^~]+\.\d+$")


@dataclass
class Recording:
    """What one process recorded."""

    process: str
    events: list[Event]
    clock_offset: float = 0.0
    """Seconds that its clock is ahead of the collector's."""
    clock_error: float = 0.0
    """The most by which `clock_offset` may be wrong."""
    truncated: bool = False
    """The ring was full: the oldest events of the window are gone."""
    is_gateway: bool = False


@dataclass
class _Links:
    """The two halves of transfers, and whose legs they belong to."""

    legs: dict[tuple[str, int], str] = field(default_factory=dict)
    sent: dict[tuple[str, str, PieceRef], tuple[float, SentEvent]] = field(default_factory=dict)
    landed: dict[tuple[str, str, PieceRef], float] = field(default_factory=dict)

    def transfers(self) -> Iterable[Transfer]:
        for key, (offset, sent) in self.sent.items():
            sender, receiver, piece = key
            at = sent.at - offset
            yield Transfer(
                sender, receiver, self._request(sender, receiver, piece.leg_id),
                sent.began - offset, self.landed.get(key, at),
                piece.start, piece.length, piece.first_layer, piece.num_layers,
                sent.packed - offset, sent.announced - offset, at,
            )  # fmt: skip

    def _request(self, sender: str, receiver: str, leg_id: int) -> str:
        """The decode worker, at whichever end, numbers the legs."""
        for owner in (receiver, sender):
            if (request := self.legs.get((owner, leg_id))) is not None:
                return request
        return f"leg {leg_id}"


def merge(recordings: Iterable[Recording]) -> Timeline:
    """Return everything on the collector's clock, in order of time."""
    timeline, links = Timeline(), _Links()
    for recording in recordings:
        _take(recording, timeline, links)
    timeline.transfers.extend(links.transfers())
    timeline.iterations.sort(key=lambda box: box.began)
    timeline.transfers.sort(key=lambda transfer: transfer.began)
    timeline.stages.sort(key=lambda stage: stage.at)
    return timeline


def request_name(wire_id: str) -> str:
    """What a request is called at the edge: a gateway adds `~` and a stamp of its own inside."""
    return _STAMP.sub("", wire_id)


def _take(recording: Recording, timeline: Timeline, links: _Links) -> None:
    me, offset = recording.process, recording.clock_offset
    for event in recording.events:
        match event:
            case IterationEvent(began, ended, parts):
                named = tuple(part._replace(request=request_name(part.request)) for part in parts)
                timeline.iterations.append(Iteration(me, began - offset, ended - offset, named))
            case StageEvent(at, request, name):
                timeline.stages.append(Stage(me, at - offset, request_name(request), name))
            case LegEvent(_, request, leg_id):
                links.legs[me, leg_id] = request_name(request)
            case SentEvent():
                links.sent[me, event.peer, event.piece] = (offset, event)
            case LandedEvent(at, peer, piece):
                links.landed[peer, me, piece] = at - offset
