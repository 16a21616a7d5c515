"""imattr: delivers user attributes to Tencent Cloud Chat. Read `worker/delivery/loop.py` first."""
