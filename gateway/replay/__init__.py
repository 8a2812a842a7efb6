"""A new policy over the ledger's history: what it would have cost, got right and taken, and how sure that is."""
