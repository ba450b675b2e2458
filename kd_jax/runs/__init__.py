"""Run folders, stages, checkpoints, configs: what a run of any experiment needs."""
