"""Exchange with Hugging Face: export to two formats, import of GPT-2, and the model file that exports ship."""
