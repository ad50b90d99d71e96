"""What a method of the store may refuse. Messages are one line, for the person who asked."""


class NotFound(Exception):
    """There is no such thing, or it is not this person's: which of both is not told."""


class Invalid(Exception):
    """Input that can't be taken: it is too long, incomplete, or contradicts itself."""


class Forbidden(Exception):
    """The person's role doesn't allow it."""


class LeaseLost(Exception):
    """The lease ran out and its task went to somebody else, or it was given back or withheld."""
