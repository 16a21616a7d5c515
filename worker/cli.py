"""The command line."""

import click, os
from pathlib import Path
from worker import simulator


@click.group()
def main() -> None: ...


@main.command()
@click.option("--port", type=int, default=9000)
@click.option("--name", "names", multiple=True)
@click.option("--latency", type=float, default=0.05)
@click.option("--quota", type=int, default=100)
@click.option("--no-record", is_flag=True)
def simulate(port, names, latency, quota, no_record) -> None:
    key = os.environ["IMATTR_SECRET_KEY"]
    api = simulator.Api(
        int(os.environ["IMATTR_SDKAPPID"]),
        key,
        names=names,
        quirks=simulator.Quirks(quota=quota, latency=latency, record=not no_record),
    )
    simulator.serve(api, port=port)


if __name__ == "__main__":
    main()
