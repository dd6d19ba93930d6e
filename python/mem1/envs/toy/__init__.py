"""A synthetic environment with its own words, tokenizer, questions and exercises."""
