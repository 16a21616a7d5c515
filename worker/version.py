"""The version of both distributions, `imattr` and `imattr-worker`."""

VERSION = "0.2.0"
