"""Where a defect is, without what it says."""

from gptlab.run import errors


def test_a_place_is_types_and_lines_and_never_a_message():
    def inner():
        raise KeyError("a secret")

    def outer():
        try:
            inner()
        except KeyError as error:
            raise ValueError("another secret") from error

    try:
        outer()
    except ValueError as error:
        said = errors.place(error)
    assert "secret" not in said and said.count("\n") == 0
    first, second = said.split(", from ")
    assert first.startswith("ValueError at ") and second.startswith("KeyError at ")
    inside = inner.__code__.co_firstlineno + 1
    assert second.endswith(f"{__name__}:{inside}")
    assert errors.place(OSError("a secret")) == "OSError at no place"


def test_of_a_deep_call_the_last_lines_are_told():
    def fall(depth):
        return fall(depth - 1) if depth else 1 // 0

    try:
        fall(50)
    except ZeroDivisionError as error:
        assert errors.place(error).count(" > ") == 7
