"""Text: tokenizer, chat templates, stopping, and texts as tokens."""
