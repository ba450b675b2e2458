"""What `python -m benchmarks.accelerator` runs: programs lowered for other devices, and measurements on this one."""
