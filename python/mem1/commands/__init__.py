"""The commands of `mem1`: each turns options into calls of the library."""
