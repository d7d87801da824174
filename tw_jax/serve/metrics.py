"""Numbers for Prometheus, in a registry of this server's own."""

from collections.abc import Callable

import prometheus_client

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """What `/metrics` shows.

    Outcomes of requests: completed, disconnected (the client left), refused (4xx, and 503 while
    the server stops) and failed (5xx).
    """

    def __init__(self) -> None:
        """Starts all counts at 0."""
        self._registry = registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "tw_jax_requests", "Requests by outcome.", ("endpoint", "outcome"), registry=registry
        )
        self.prompt_tokens = prometheus_client.Counter(
            "tw_jax_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.completion_tokens = prometheus_client.Counter(
            "tw_jax_completion_tokens", "Tokens of answers.", registry=registry
        )
        self.engine_failures = prometheus_client.Counter(
            "tw_jax_engine_failures", "Failures of the rollout engine.", registry=registry
        )
        self._queued = prometheus_client.Gauge(
            "tw_jax_queue_length", "Rollouts that wait for a place.", registry=registry
        )
        self._running = prometheus_client.Gauge(
            "tw_jax_running", "Rollouts in the engine.", registry=registry
        )
        self.first_token_s = prometheus_client.Histogram(
            "tw_jax_time_to_first_token_seconds",
            "From a streaming request's arrival to its first token, of a thread or of the text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.latency_s = prometheus_client.Histogram(
            "tw_jax_request_latency_seconds",
            "From a request's arrival to the end of its answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(self, running: Callable[[], float], queued: Callable[[], float]) -> None:
        """Reads the two gauges from functions."""
        self._running.set_function(running)
        self._queued.set_function(queued)

    def text(self) -> bytes:
        """Prometheus's text format."""
        return prometheus_client.generate_latest(self._registry)
