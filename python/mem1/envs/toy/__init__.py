"""A synthetic world with its own words, tokenizer, questions and exercises."""
