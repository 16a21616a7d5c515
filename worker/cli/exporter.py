"""`imattr exporter`: the fleet's metrics for Prometheus."""

from __future__ import annotations

import time

import click

from worker.cli.terminal import FAILED, explained, fail, out, state, until_stopped
from worker.operate import exporter as fleet
from worker.operate import health


@click.command()
@click.option(
    "--port", default=9464, show_default=True, type=click.IntRange(1, 65_535), help="Port to listen on."
)
@click.option("--host", default="", help="Address to listen on. [default: all interfaces]")
@explained
def exporter(port: int, host: str) -> None:
    """Serve the fleet's metrics to Prometheus.

    Run one for an app: it reads from Redis what all workers share. Each worker serves its own metrics at /metrics of
    IMATTR_HEALTH_PORT.
    """
    with state() as (redis, settings), until_stopped() as stopped:
        try:
            server = health.serve(port, fleet.pages(redis, settings), host=host)
        except OSError as error:
            fail(FAILED, f"port {port}: {error.strerror}")
        out.print(f"metrics of app {settings.sdkappid} at http://{host or '127.0.0.1'}:{port}/metrics")
        while not stopped():
            time.sleep(0.2)
        server.shutdown()
