"""The error of tokenizers and chat templates. It stands alone, so that importing it does not import Jinja."""


class TextError(ValueError):
    """A tokenizer or template that cannot be used, or messages that the template refuses."""
