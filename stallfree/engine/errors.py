"""The error that text raises. It stands alone, so that whoever needs no chat template needs no Jinja either."""


class TextError(ValueError):
    """A tokenizer or template that cannot be used, or messages that the template refuses."""
