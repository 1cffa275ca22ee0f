"""What the operations share: device functions, launch configurations, launch helpers."""
