"""How the bundled demonstration model is made: its text, its tokenizer, its training.

Nothing here is on the serving path, and nothing here is shipped in the wheel; the result is,
as `services/tandem/bundled_model`.
"""
