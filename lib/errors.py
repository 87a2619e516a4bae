"""What a user can mend, said in one sentence."""
import contextlib

# What Python raises where JSON of others does not hold what it should.
ODD = ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError


class InputError(Exception):
    """Something a user can mend; the message is the one sentence that says what and how."""


@contextlib.contextmanager
def user_errors(errors=ValueError, kind: type[InputError] = InputError, sentence: str = "{error}"):
    """Say what goes wrong inside as one sentence to the user.

    errors: the exceptions that are meant; mesh and edits raise ValueErrors. kind: what is raised
    in their place. sentence: {error} in it is what they say, {reason} is their first cause.
    """
    try:
        yield
    except errors as error:
        said = sentence.replace("{error}", str(error)).replace("{reason}", first_cause(error))
        raise kind(said) from error


def first_cause(error: BaseException) -> str:
    """What an exception began with: its type and the first line of what it says, cut if long."""
    while error.__cause__:
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    text = lines[0].partition(" [tensorstore_spec")[0]
    if len(text) >= 166:
        text = f"{text[:60]} ... {text[-100:]}"
    return f"{type(error).__name__}: {text}"
