"""What the ledger has learned, as tables: labels for `leadline probe fit`, outcomes for `leadline simulate`."""
