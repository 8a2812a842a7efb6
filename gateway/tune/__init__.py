"""`leadline tune`: which plan of the engine pays on this machine, measured, and written into the policy."""
