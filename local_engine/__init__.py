"""The local engine: one process that owns the accelerator, generates, probes and embeds."""
