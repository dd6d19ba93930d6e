"""The agents that an evaluation compares: MEM1, what else there is on the same engine, and scripts."""
