"""What Prometheus reads: counts of the server's events and transfers, the fleet, the disk.

Counters begin at zero with every start, as Prometheus expects; what must outlive one is in the store. The
figures are kept by the server's thread and read by that of the HTTP server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from edge_sdk.config.run import RunConfig
from edge_sdk.errors import ConfigError, MissingExtraError
from edge_sdk.events import Event

try:
    from prometheus_client import (
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        ProcessCollector,
        start_http_server,
    )
    from prometheus_client.core import CounterMetricFamily
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"metrics.listen needs {error.name}, which is not installed", "pip install 'edge-sdk[server]'"
    ) from error

__all__ = ["Metrics"]

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_PHASES = ("open", "merge", "evaluation", "overhead")


class Metrics:
    """Subscribe it to the server's events; ``serve`` it until ``close``.

    Args:
        traffic: payload bytes and chunks since the start, by the names of the ledger's columns.
        free_bytes: room on the state folder's disk.
    """

    def __init__(
        self, config: RunConfig, traffic: Mapping[str, int], free_bytes: Callable[[], float]
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._http: WSGIServer | None = None
        self._thread: Thread | None = None
        self._online: set[str] = set()

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(name, text, labels, namespace="edge", registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, namespace="edge", registry=registry)

        def seconds(name: str, text: str, labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(name, text, labels, namespace="edge", registry=registry, buckets=_SECONDS)

        info = gauge("run_info", "The run that is served", ("run", "method"))
        info.labels(config.run.name, config.run.method).set(1)
        gauge("rounds_planned", "Rounds that the run has in all").set(config.rounds.total)
        gauge("disk_free_bytes", "Room on the state folder's disk").set_function(free_bytes)
        gauge("disk_keep_free_bytes", "Room below which the rounds pause").set(
            config.storage.keep_free_mb * 1e6
        )
        self._round = gauge("round", "The present round")
        self._rounds = counter("rounds", "Rounds that ended", ("outcome",))
        self._round_s = seconds("round_seconds", "What a round took, by phase", ("phase",))
        self._received = counter("updates_received", "Updates that were stored and receipted")
        self._received_bytes = counter("updates_received_bytes", "Bytes of these updates")
        self._refused = counter("updates_refused", "Updates that were refused, by cause", ("reason",))
        self._set_aside = counter("updates_set_aside", "Received updates that could not be merged")
        self._declined = counter("offers_declined", "Offers that devices declined", ("reason",))
        self._train_s = seconds("training_seconds", "What devices needed to train, as they measured it")
        self._upload_s = seconds("upload_seconds", "From an update's announce to its receipt")
        self._devices = gauge("devices_online", "Devices that are there")
        self._turned_away = counter("devices_refused", "Devices that may not join, by cause", ("reason",))
        self._version = gauge("version", "Number of the newest version")
        self._version_bytes = gauge("version_bytes", "Size of the newest version")
        self._accuracy = gauge("version_accuracy", "Held-out accuracy of the newest evaluated version")
        self._loss = gauge("version_loss", "Held-out loss of the newest evaluated version")
        self._broker = gauge("broker_connected", "Whether the broker is reached")
        self._paused = gauge("paused", "Whether the rounds pause, by cause", ("cause",))
        for cause in ("storage", "merge"):
            self._paused.labels(cause).set(0)
        registry.register(_Traffic(traffic))
        ProcessCollector(registry=registry)

    def __call__(self, event: Event) -> None:
        """Takes an event in; those that no figure is made of pass."""
        f = event.fields
        match event.name:
            case "run.ready" | "round.opened":
                self._round.set(f["round"])
            case "round.done":
                self._rounds.labels(f["outcome"]).inc()
                for phase in _PHASES:
                    if f[f"{phase}_s"] is not None:
                        self._round_s.labels(phase).observe(f[f"{phase}_s"])
            case "update.received":
                self._on_received(f)
            case "update.refused":
                self._refused.labels(f["reason"]).inc()
            case "update.set_aside":
                self._set_aside.inc()
            case "round.held":
                self._paused.labels("merge").set(1)
            case "round.decline":
                self._declined.labels(f["reason"]).inc()
            case "device.refused":
                self._turned_away.labels(f["reason"]).inc()
            case "version.made":
                self._paused.labels("merge").set(0)
                self._version.set(f["version"])
                self._version_bytes.set(f["bytes"])
            case "version.evaluated":
                self._accuracy.set(f["accuracy"])
                self._loss.set(f["loss"])
            case "storage.paused" | "storage.resumed":
                self._paused.labels("storage").set(event.name == "storage.paused")
            case "device.online" | "device.joined":
                self._online.add(f["device"])
            case "device.offline":
                self._online.discard(f["device"])
            case "broker.up" | "broker.down":
                self._broker.set(event.name == "broker.up")
        if event.name in ("broker.down", "storage.paused"):
            self._online.clear()  # who is there says so again
        self._devices.set(len(self._online))

    def serve(self, listen: str) -> str:
        """Answers over HTTP from now on; gives the URL. Raises ConfigError where nobody can listen there."""
        host, _, port = listen.rpartition(":")
        try:
            self._http, self._thread = start_http_server(int(port), host.strip("[]"), registry=self.registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f'metrics.listen is "{listen}", where nobody can listen: {error}',
                "name an address of this machine and a port that is free",
            ) from error
        return f"http://{host}:{self._http.server_port}/metrics"

    def close(self) -> None:
        """Ends the answers. May be called twice."""
        if self._http is not None and self._thread is not None:
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()
            self._http = self._thread = None

    def _on_received(self, f: Mapping[str, Any]) -> None:
        self._received.inc()
        self._received_bytes.inc(f["bytes"])
        self._train_s.observe(f["train_s"])
        if f["upload_s"] is not None:
            self._upload_s.observe(f["upload_s"])


class _Traffic(Collector):
    """Counted by the transfers themselves: an event for every chunk would cost more than the chunk."""

    def __init__(self, traffic: Mapping[str, int]) -> None:
        self._traffic = traffic

    def collect(self) -> Iterator[CounterMetricFamily]:
        counts = self._traffic
        payload = CounterMetricFamily(
            "edge_transfer_bytes", "Payload bytes of chunks; up: from devices", labels=["direction"]
        )
        payload.add_metric(["up"], counts.get("bytes_up", 0))
        payload.add_metric(["down"], counts.get("bytes_down", 0))
        yield payload
        for name, text, column in (
            ("duplicate_bytes", "Payload bytes from devices that came more than once", "duplicate_bytes"),
            ("messages_foreign", "Messages that were no use", "foreign"),
        ):
            yield CounterMetricFamily(f"edge_{name}", text, counts.get(column, 0))
