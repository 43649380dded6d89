"""What /metrics shows, in the form that Prometheus reads."""

import jax
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "storm_requests", "Chat completions, by HTTP status.", ["status"], registry=registry
        )
        self.open = Gauge("storm_requests_open", "Requests not yet answered.", registry=registry)
        self.waiting = Gauge("storm_requests_waiting", "Wait for a slot.", registry=registry)
        self.running = Gauge("storm_requests_running", "Hold a slot.", registry=registry)
        self.slots = Gauge("storm_slots", "Slots for answers.", registry=registry)
        self.seconds = Histogram(
            "storm_request_seconds", "From request to end.", buckets=_SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "storm_time_to_first_token_seconds",
            "From the end of the request's body to the first text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "storm_time_per_output_token_seconds",
            "Mean over an answer, its first token left out.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "storm_prompt_tokens",
            "Of admitted requests, visual tokens included.",
            registry=registry,
        )
        self.reused_tokens = Counter(
            "storm_prompt_tokens_reused", "That an earlier answer had left.", registry=registry
        )
        self.answer_tokens = Counter("storm_answer_tokens", "Generated.", registry=registry)
        self.visual_tokens = Counter(
            "storm_visual_tokens", "Of admitted requests.", registry=registry
        )
        self.frames = Counter("storm_frames_encoded", "Through the ViT.", registry=registry)
        self.decode_seconds = Counter(
            "storm_decode_seconds", "Spent decoding media, all processes.", registry=registry
        )
        self.encode_seconds = Counter(
            "storm_encode_seconds", "Spent encoding frames.", registry=registry
        )
        self.media_errors = Counter(
            "storm_media_errors", "Media that were refused.", registry=registry
        )
        self.cache_hits = Counter(
            "storm_visual_cache_hits", "Media that were kept from before.", registry=registry
        )
        self.cache_misses = Counter(
            "storm_visual_cache_misses", "Media that had to be encoded.", registry=registry
        )
        self.cache_bytes = Gauge(
            "storm_visual_cache_bytes", "Of the media kept, on the device.", registry=registry
        )
        self.cache_entries = Gauge(
            "storm_visual_cache_entries", "Media that are kept.", registry=registry
        )
        self.compiles = Counter(
            "storm_compiles", "Programs compiled, or found on disk.", registry=registry
        )
        self.compile_seconds = Counter(
            "storm_compile_seconds", "Spent compiling, beside all else.", registry=registry
        )
        self.compile_waits = Counter(
            "storm_compile_waits",
            "Prompts and media that waited for a program.",
            registry=registry,
        )
        self.compile_wait_seconds = Counter(
            "storm_compile_wait_seconds", "For which they waited, added up.", registry=registry
        )
        self.compiling = Gauge(
            "storm_requests_compiling",
            "Prompts and media that wait for a program.",
            registry=registry,
        )
        registry.register(_DeviceMemory())
        ProcessCollector(registry=registry)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)


class _DeviceMemory:
    """Bytes in use on each device that tells; a CPU does not."""

    def collect(self):
        family = GaugeMetricFamily(
            "storm_device_memory_bytes", "In use on a device.", labels=["device"]
        )
        for device in jax.local_devices():
            stats = device.memory_stats()
            if stats:
                family.add_metric([str(device.id)], stats["bytes_in_use"])
        yield family
