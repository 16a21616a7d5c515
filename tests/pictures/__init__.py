"""The pictures of the documentation, each drawn by a script: `python -m tests.pictures`.

Those that show a run show a real one: of the real scripts, dispatcher and delivery loop. Where it is in virtual time, the
picture is the same each time, and a test holds it to its script.
"""
