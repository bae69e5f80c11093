"""Reports that need no timing on a GPU: machine code, bytes moved, host cost; and the tuning of tiles."""
