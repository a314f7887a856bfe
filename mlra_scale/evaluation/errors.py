"""The error of this room: its text is one clear sentence."""


class EvaluationError(ValueError):
    """A model, a text or a choice cannot be used; the message names it and says what to do."""
