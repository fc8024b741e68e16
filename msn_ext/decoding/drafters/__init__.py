"""Drafters: where guesses come from. They know trees, texts and the model's answers, and nothing
of models.
"""
