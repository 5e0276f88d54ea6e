"""One user of a module at a time, where hooks on it would hear the calls of others."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn


class _Turn:
    """A lock, and the thread that holds it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.holder: int | None = None


# Not attributes of the modules: a lock can neither be copied nor pickled.
_TURNS: "WeakKeyDictionary[nn.Module, _Turn]" = WeakKeyDictionary()
_GUARD = threading.Lock()


@contextmanager
def exclusive(module: nn.Module) -> Iterator[None]:
    """
    Inside the block no other thread is in one for the same module; it waits for its turn.

    Raises:
        RuntimeError: When this thread is in such a block already: what it calls now would be taken for its first call.
    """
    with _GUARD:
        turn = _TURNS.setdefault(module, _Turn())
    me = threading.get_ident()
    if turn.holder == me:
        raise RuntimeError(
            "The model was called while it generates, by a streamer, a stopping criterion or a logits processor. Call "
            "it after `generate` has returned, or use a copy of it there (`copy.deepcopy(model)`)."
        )
    with turn.lock:
        turn.holder = me
        try:
            yield
        finally:
            turn.holder = None
