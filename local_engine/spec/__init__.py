"""Token speculation without loss: drafts by several proposers, verified, and only as long as they pay."""
