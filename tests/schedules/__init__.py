"""Deterministic simulation: the whole fleet in virtual time, with faults at every step, thousands of times.

A *schedule* is one run of a few virtual minutes, in which a seed decides everything: how many processes and
threads, what producers and operators do, how the API behaves, and which faults strike before and after each
script and each request. State machine, policy, dispatcher and delivery loop are the product's own, the scripts
run on a real server; clock, network and broker are ours. What writers were told and what the API got is judged
by `tests/history.py`. The same seed gives the same schedule, step by step::

    python -m tests.schedules --seeds 5000     # or make schedules
    python -m tests.schedules --seed 4711      # one again, with every step told

Read `run.py` first; `plan.py` has what is drawn from the seed, `wire.py` the way to Redis.
"""
