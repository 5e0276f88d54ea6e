"""What the server counts, in Prometheus' form."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class ServerMetrics:
    """
    Counters of one server.

    Args:
        engine (`Engine`): Whose load is shown.
    """

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(_Load(engine))

        def make(kind, name, about, *labels, **options):
            return kind(f"latent_trl_{name}", about, labels, registry=self.registry, **options)

        # The status of a client that hung up is nginx's, 499.
        self.requests = make(Counter, "requests", "Chat completions by HTTP status; 499 hung up", "status")
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of conversations that were answered")
        self.completion_tokens = make(Counter, "completion_tokens", "Tokens of answers")
        self.first_token = make(Histogram, "first_piece_seconds", "Until the first piece was there", buckets=SECONDS)
        self.seconds = make(Histogram, "request_seconds", "Of a chat completion", buckets=SECONDS)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Load(Collector):
    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self):
        for name, value in self.engine.load().items():
            yield GaugeMetricFamily(f"latent_trl_{name}", f"Requests or answers {name}", value=value)
