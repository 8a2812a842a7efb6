"""`leadline exits`: when thoughts of a local model may be left early: fitted, certified, compared.

Trajectories come from the engine (`local_engine.reason.trajectories`), the statistics from `probes.exits`; neither
knows the other. Run by hand; no gateway worker imports this.
"""
