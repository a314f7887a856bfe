"""The error that data raise for a user's mistake: its text is one clear sentence."""


class DataError(ValueError):
    """A source, a data set or a tokenizer cannot be used; the message names it and says what to do."""
