"""imattr: delivers user attributes to Tencent Cloud Chat. Read `worker/delivery.py` first."""
