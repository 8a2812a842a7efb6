"""A fake upstream with its own oracle: it answers, misbehaves on command, and keeps its own books.

    python -m tests.upstream --port 0 --truth FILE --seed N

prints its URL and serves until it is told to stop. `server.Upstream` is the same in a test's own process. It shares no
code with the gateway: its tokens are words, its money Decimal dollars (`oracle`), and each call leaves one row in the
truth file (`truth`), which a test joins with the gateway's ledger and with what the client was told.

The gateway passes none of its caller's headers on, so control travels in the body's `metadata` (strings all):

| key | meaning |
| --- | --- |
| `call` | the caller's name of this call, under which its rows are joined |
| `fault`, `variant` | what to play (`faults.FAULTS`); none: answer properly |
| `on` | `all` attempts of this call (default), or the `first` alone |
| `words`, `reasoning`, `cached`, `written` | tokens of the answer and of the prompt's classes, instead of seeded ones |
| `hidden` | `1`: reasoning is counted and never shown |
| `pace_ms` | milliseconds between two events of a stream, between two bytes of F23; before a whole answer |
| `after` | events that a stream sends before its fault (default 3) |
| `location` | where F14 sends its caller |
"""
