"""Exchanging the presets of a running server.

All or nothing: the files are read and checked first, and a mistake in any of them leaves the presets in
force as they are.  Requests that were admitted keep the formula that they were admitted with.

With several API servers each has the presets in its own memory.  The one that reloads tells the others
through a file in the directory that vLLM's API servers share for their metrics, and they look at it once
a second; each then reads the presets for itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from vllm.logger import init_logger

from vllm_marith.engine.frontend.admission import Admission
from vllm_marith.language import Presets

from .naming import check_names

logger = init_logger(__name__)

_POLL_SECONDS = 1.0


class Reloader:
    """Reads presets anew and puts them in force.

    Args:
        admission: whose presets are exchanged.
        load: reads the presets; raises PresetError.
        names: the names that presets must not have now: (served models, adapters).
        bell: a file whose change tells the other API servers to reload; None where there are none.
    """

    def __init__(
        self,
        admission: Admission,
        load: Callable[[], Presets],
        names: Callable[[], tuple[Iterable[str], Iterable[str]]],
        bell: Path | None = None,
    ) -> None:
        self._admission = admission
        self._load = load
        self._names = names
        self._bell = bell
        self._heard = self._last_rung()

    def reload(self) -> Presets:
        """Reads, checks, and puts in force.

        Raises:
            ValueError: the sentence names file, line and reason; the old presets are still in force.
        """
        presets = self._load()
        check_names(presets, *self._names())
        self._admission.use(presets)
        logger.info("marith: %d presets in force", len(presets.presets))
        return presets

    def reload_all(self) -> Presets:
        """As `reload`, and tells the other API servers once these presets have proved good."""
        presets = self.reload()
        if self._bell is not None:
            ring(self._bell)
            self._heard = self._last_rung()
        return presets

    def on_signal(self) -> None:
        """SIGHUP: there is nobody to answer to but the log."""
        try:
            self.reload_all()
        except ValueError as error:
            logger.error("marith: the presets stay as they are: %s", error)

    async def listen(self) -> None:
        """Reloads whenever another API server has; for ever."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            rung = self._last_rung()
            if rung != self._heard:
                self._heard = rung
                try:
                    self.reload()
                except ValueError as error:
                    logger.error("marith: the presets stay as they are: %s", error)

    def _last_rung(self) -> int:
        try:
            return self._bell.stat().st_mtime_ns if self._bell is not None else 0
        except FileNotFoundError:
            return 0


def shared_bell() -> Path | None:
    """Where the API servers of one start tell each other; None for a server by itself."""
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(shared) / "marith-presets" if shared else None


def ring(bell: Path) -> None:
    """Tells every API server that listens to read its presets anew."""
    bell.write_text(str(os.getpid()))


def forward_hangups() -> None:
    """Lets the parent of several API servers pass SIGHUP on to them instead of ending by it."""
    bell = shared_bell()
    if bell is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, lambda *_: ring(bell))
