"""Breaks everything that can break under a real system at work, and judges what came of it: `make chaos`.

Real servers, real worker processes, real connections; a seed decides what is broken when. Writers note what
they were told, the simulator what it got, and `tests/history.py`, which knows nothing of the product,
compares the two.
"""
