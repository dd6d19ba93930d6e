"""Retrieval: passages of a corpus for a query, in this process or from a server."""
