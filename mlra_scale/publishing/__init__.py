"""Publishing: a checkpoint as a verified Hugging Face folder, with a text to verify it on, and its way to a hub.

exporting.py finds tokenizer and text and exports, hub.py pushes.
"""
