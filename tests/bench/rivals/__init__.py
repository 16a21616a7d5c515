"""imattr beside what a user would pick instead: the same events, machine, Redis and simulator for each.

Read `contestants.py` for who takes part, the modules named there for how each is written (what its own
documents recommend, with the best settings we know), `measure.py` for what is done to all of them, and
`results.py` for what is judged. `python -m tests.bench.rivals --help` runs it.
"""
