"""A batch: successive events of all streams, within the limits of one PutLogEvents request for each stream.

The limits are those of AWS's documentation of PutLogEvents.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlflow_host.logs.journal import Event

BYTES = 1 << 20
EVENTS = 10_000
OVERHEAD_BYTES = 26
"""Added to each event's size in UTF-8."""
SPAN = 24 * 3600 * 1000
"""Milliseconds between the first and the last event."""


@dataclass
class Batch:
    cursor: str = ""
    """The journal's cursor of the last line, whether it became an event or not."""
    streams: dict[str, list[Event]] = field(default_factory=dict)
    _bytes: dict[str, int] = field(default_factory=dict)

    def takes(self, event: Event) -> bool:
        """Whether all limits hold with this event, too."""
        there = self.streams.get(event.stream, [])
        times = [each.at for each in (*there[:1], *there[-1:])] + [event.at]
        return (
            len(there) < EVENTS
            and self._bytes.get(event.stream, 0) + size(event) <= BYTES
            and max(times) - min(times) < SPAN
        )

    def add(self, cursor: str, event: Event | None) -> None:
        self.cursor = cursor
        if event is None:
            return
        there = self.streams.setdefault(event.stream, [])
        # Requests must be in the order of time. The journal's is that of arrival: a clock that was set back differs.
        place = len(there)
        while place and there[place - 1].at > event.at:
            place -= 1
        there.insert(place, event)
        self._bytes[event.stream] = self._bytes.get(event.stream, 0) + size(event)


def size(event: Event) -> int:
    return len(event.text.encode()) + OVERHEAD_BYTES
