"""What a user can mend, said in one sentence."""
import contextlib


class InputError(Exception):
    """Something a user can mend; the message is the one sentence that says what and how."""


@contextlib.contextmanager
def user_errors(errors=ValueError, kind: type[InputError] = InputError, sentence: str = "{error}"):
    """What goes wrong inside (mesh and edits raise ValueErrors), for the user; {reason}: its first cause."""
    try:
        yield
    except errors as error:
        cause = error
        while cause.__cause__:
            cause = cause.__cause__
        text = (str(cause).splitlines() or [""])[0].partition(" [tensorstore_spec")[0]
        reason = f"{type(cause).__name__}: {text if len(text) < 166 else text[:60] + ' ... ' + text[-100:]}"
        raise kind(sentence.replace("{error}", str(error)).replace("{reason}", reason)) from error
