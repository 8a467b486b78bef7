"""The metrics as Prometheus reads them. A scrape renders the last looks; it asks no host."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from mlxops import __version__
from mlxops.control.serve.hosts import Hosts
from mlxops.core.metrics import HOSTS_FILE, Family, Sample, samples

AnyFamily = CounterMetricFamily | GaugeMetricFamily


class HostsCollector(Collector):
    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    def collect(self) -> Iterable[AnyFamily]:
        own = Sample(HOSTS_FILE, (), float(self._hosts.file_valid))
        families: dict[str, AnyFamily] = {}
        for sample in (own, *samples(self._hosts.views, __version__)):
            found = families.setdefault(sample.family.name, _empty(sample.family))
            found.add_metric(sample.labels, sample.value)
        return families.values()


def _empty(family: Family) -> AnyFamily:
    kind = CounterMetricFamily if family.counter else GaugeMetricFamily
    return kind(family.name, family.help, labels=family.labels)


class Exposition:
    def __init__(self, hosts: Hosts) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(HostsCollector(hosts))
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the page and its content type, in the newest format that the client takes."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
