"""`python -m worker.cli`: the same as the command `imattr`."""

from worker.cli.main import main

main()
