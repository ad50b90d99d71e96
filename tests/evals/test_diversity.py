"""Diversity figures against hand counts."""

import math

from gptlab.evals import diversity


def test_distinct_pairs_are_pooled_and_do_not_span_replies():
    replies = [[1, 2, 3], [1, 2], [3, 1]]
    # Pairs: 12 23 | 12 | 31; the pairs 3-1 and 2-3 across replies are not there.
    assert diversity.distinct_ngrams(replies, 2, 100) == 3 / 4


def test_distinct_stops_at_the_token_count():
    replies = [[1, 1, 1], [4, 5, 6, 7]]
    assert diversity.distinct_ngrams(replies, 2, 3) == 1 / 2
    assert diversity.distinct_ngrams(replies, 2, 5) == 2 / 3
    assert diversity.distinct_ngrams(replies, 2, 7) == 4 / 5


def test_repeating_one_varied_reply_is_not_diverse():
    varied = list(range(10))
    assert diversity.distinct_ngrams([varied] * 10, 2, 100) == 0.1


def test_equal_token_count_is_the_least_total():
    systems = {"a": [[1, 2], [3]], "b": [[1, 2, 3, 4]], "c": [[], [1, 2, 3, 4, 5]]}
    assert diversity.equal_token_count(systems) == 3


def test_no_pairs_is_not_a_number():
    assert math.isnan(diversity.distinct_ngrams([[1], [2]], 2, 10))


def test_most_common_reply_ignores_case_and_space():
    replies = ["Great!", " great! ", "fine", "GREAT!", "no"]
    assert diversity.most_common_reply(replies) == ("great!", 3 / 5)
    assert math.isnan(diversity.most_common_reply([])[1])
