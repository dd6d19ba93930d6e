"""Questions that a retriever helps to answer: their files, their composition, the environment."""
