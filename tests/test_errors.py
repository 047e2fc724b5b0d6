"""The exception tree, and the list of alternatives that `choose` gives."""

from __future__ import annotations

import inspect

import pytest

from lplr import errors


def test_every_exception_is_an_lplr_error_and_stands_in_the_drawing():
    found = {name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert all(issubclass(value, errors.LplrError) for value in found.values())
    for name in found:
        assert name in (errors.__doc__ or "")


def test_a_recipe_error_is_a_value_error_for_callers_who_do_not_know_us():
    assert issubclass(errors.RecipeError, ValueError)


def test_choose_returns_the_entry():
    assert errors.choose({"a": 1}, "a", "letter") == 1


def test_choose_lists_the_alternatives_and_the_nearest():
    with pytest.raises(errors.RecipeError) as caught:
        errors.choose({"gaussian": 1, "srht": 2}, "gausian", "sketch")
    message = str(caught.value)
    assert message == "unknown sketch 'gausian': choose one of gaussian, srht; did you mean 'gaussian'?"


def test_choose_suggests_nothing_where_nothing_is_near():
    with pytest.raises(errors.RecipeError, match="unknown sketch 'zzz': choose one of gaussian, srht$"):
        errors.choose({"gaussian": 1, "srht": 2}, "zzz", "sketch")


@pytest.mark.parametrize("name", ["one.safet\nsors", "\r", "\x1b[2J", "\u2028", "\udcff", "a\tb"])
def test_what_a_hostile_name_does_to_a_terminal_is_shown_and_not_done(name):
    said = str(errors.CheckpointError(f"{name}: shard missing, größer, 模型: download it again"))
    assert said.isprintable() and said.endswith(": shard missing, größer, 模型: download it again")


def test_a_message_of_printable_characters_is_as_it_was_written():
    assert str(errors.CheckpointError(r"C:\new 'x': damaged")) == r"C:\new 'x': damaged"
