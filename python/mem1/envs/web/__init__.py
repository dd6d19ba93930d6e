"""The open web as a world: questions that are answered with a search API and the pages that it finds."""
