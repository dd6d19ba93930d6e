"""How a command runs: where it computes, how it waits, how far it is, when it is stopped."""
