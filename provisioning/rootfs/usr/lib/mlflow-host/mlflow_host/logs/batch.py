"""A batch contains successive events of all log streams. One PutLogEvents request can send all events of one stream.

The limits of a request are from AWS's documentation of PutLogEvents.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlflow_host.logs.journal import Event

BYTES = 1 << 20
EVENTS = 10_000
OVERHEAD_BYTES = 26
"""To compute a request's size, CloudWatch adds this number of bytes to the size of each event in UTF-8."""
SPAN = 24 * 3600 * 1000
"""Maximum number of milliseconds between the first and the last event of a request."""


@dataclass
class Batch:
    cursor: str = ""
    """The cursor of the last journal line that was read, even if the line has no event in the batch."""
    streams: dict[str, list[Event]] = field(default_factory=dict)
    _bytes: dict[str, int] = field(default_factory=dict)

    def takes(self, event: Event) -> bool:
        """Whether the batch stays within all limits if this event is added."""
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
        # The events of a request must be sorted by time. The journal is sorted by arrival, and the two orders differ if
        # the clock was set back.
        place = len(there)
        while place and there[place - 1].at > event.at:
            place -= 1
        there.insert(place, event)
        self._bytes[event.stream] = self._bytes.get(event.stream, 0) + size(event)


def size(event: Event) -> int:
    return len(event.text.encode()) + OVERHEAD_BYTES
