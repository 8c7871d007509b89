"""The memory of one model's attention reuse: its streams, by name and by thread, and the bytes that they take."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping

from attnrewrite.caching.streams import Key, Stream
from attnrewrite.errors import CacheMemoryError

__all__ = ["CacheMemory"]

log = logging.getLogger("attnrewrite")


class CacheMemory:
    """The streams of one model. Each thread has streams of its own; ``limit`` holds for all of them together."""

    def __init__(self, name: str, limit: int | None, offload: bool) -> None:
        """Args:
        name: the model's, for messages.
        limit: in bytes; None is no limit.
        offload: whether the host's memory is used, and not the device's.
        """
        self._name = name
        self._limit = limit
        self._place = "the host" if offload else "the device"
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._generation = 0

    @property
    def nbytes(self) -> int:
        """The bytes that are stored, or will be at the end of the calls that are being made."""
        with self._lock:
            return sum(sum(stream.reserved.values()) for stream in self._streams)

    def stream(self, name: tuple[str, ...], tensor_format: str | None) -> Stream:
        """This thread's stream of a name; a new one on first use and after :meth:`reset`.

        Args:
            tensor_format: of a new stream, as for :class:`Stream`.
        """
        thread = self._of_thread
        if getattr(thread, "generation", None) != self._generation:
            thread.generation, thread.streams = self._generation, {}
        streams: dict[tuple[str, ...], Stream] = thread.streams
        if name not in streams:
            streams[name] = Stream(tensor_format)
            with self._lock:
                self._streams.add(streams[name])
        return streams[name]

    def reset(self, before_clear: Callable[[Stream], None]) -> None:
        """Forgets all streams of all threads.

        Args:
            before_clear: sees each stream that is about to be cleared.
        """
        with self._lock:
            self._generation += 1
            for stream in self._streams:
                # Another thread may be in a call: its stream is replaced, and not emptied under it.
                if not stream.in_call:
                    before_clear(stream)
                    stream.clear()
            self._streams = weakref.WeakSet()

    def reserve(self, stream: Stream, sizes: Mapping[Key, int]) -> None:
        """Counts the bytes of values before they are stored.

        Args:
            sizes: the bytes of each value.

        Raises:
            CacheMemoryError: the limit would be exceeded.
        """
        new = {key: nbytes for key, nbytes in sizes.items() if stream.reserved.get(key) != nbytes}
        if not new:
            return
        needed = sum(new.values())
        taken = self.nbytes - sum(stream.reserved.get(key, 0) for key in new)
        what = "1 attention value" if len(new) == 1 else f"{len(new)} attention values"
        log.info("%s: %s, %s of %s's memory", self._name, what, _bytes_in_words(needed), self._place)
        if self._limit is not None and taken + needed > self._limit:
            others = f", in addition to {_bytes_in_words(taken)} that are stored already" if taken else ""
            raise CacheMemoryError(
                f"{what} of {self._name} would take {_bytes_in_words(needed)} of {self._place}'s memory{others}, and "
                f"memory_limit is {_bytes_in_words(self._limit)}: raise it (None is no limit), keep fewer attentions "
                "(a skip range of None, or block identifiers), or call disable_cache(model)"
            )
        stream.reserved.update(new)


def _bytes_in_words(nbytes: int) -> str:
    if nbytes < 2**10:
        return f"{nbytes} bytes"
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:,.1f} KiB"
