"""A server on loopback, in a thread."""

import threading
from contextlib import contextmanager
from pathlib import Path

CARDS = Path(__file__).parents[2] / "model_cards"


@contextmanager
def serving(engine, **options):
    """A server of `engine`; what is given is its address."""
    from latent_trl.serving.server import make_server

    ready, addresses = threading.Event(), []

    def note(url):
        addresses.append(url)
        ready.set()

    server = make_server(engine, "pocket", port=0, ready=note, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(20)
    try:
        yield addresses[0]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
