"""Probes: small calibrated heads on hidden states that say, per model, how likely a good answer is."""
