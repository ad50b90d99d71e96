"""Scorers score what they say, and a spec that is wrong says what would be right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from gptlab.data.records import Candidate, Comparison, Message, Prompt
from gptlab.run.errors import UserError
from gptlab.scorers import classifiers, registry
from tests.fixtures import read_records

PROMPT = Prompt("p", (Message("user", "How was it?"),), "s")
SPECS = {
    "vader": {"name": "vader"},
    "word_fraction": {"name": "word_fraction", "words": ("good", "You")},
    "length": {"name": "length"},
    "repetition": {"name": "repetition", "ngram": 2},
    "tfidf_comparisons": {
        "name": "tfidf_comparisons",
        "input": "reviews",
        "records_name": "comparisons",
        "split": "train",
        "min_count": 1,
        "inverse_penalty": 1.0,
    },
}


def score(scorer, *replies):
    return scorer([PROMPT] * len(replies), replies)


@pytest.mark.parametrize("name", SPECS)
def test_every_scorer_is_made_by_name_and_scores_any_text(name, tiny_clean):
    assert set(SPECS) == set(registry._FACTORIES)
    scorer = registry.make(ConfigDict(SPECS[name]), ConfigDict({"reviews": str(tiny_clean)}))
    replies = ["It was good!", "", "...", "great great great", "\0\u2581🙂" * 3]
    scores = score(scorer, *replies)
    assert scores.shape == (5,) and scores.dtype == np.float32 and np.isfinite(scores).all()
    np.testing.assert_array_equal(scores, [score(scorer, reply)[0] for reply in replies])
    assert score(scorer).shape == (0,)
    assert isinstance(scorer.name, str) and scorer.name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "vadar"}, "no scorer 'vadar'; there are length, .*did you mean 'vader'"),
        ({}, "no scorer None"),
        ({"name": "repetition"}, "'repetition' takes ngram; got none"),
        ({"name": "vader", "scale": 2}, "'vader' takes no settings; got scale"),
        ({"name": "repetition", "ngram": 0}, "at least 1"),
        ({"name": "word_fraction", "words": ()}, "`words` is empty"),
        (SPECS["tfidf_comparisons"], "config.inputs.reviews, which is not given"),
    ],
)
def test_a_wrong_spec_says_what_would_be_right(spec, message):
    with pytest.raises(UserError, match=message):
        registry.make(ConfigDict(spec))


def test_vader_likes_what_is_upbeat_and_is_gamed_by_repetition():
    vader = registry.make(SPECS["vader"])
    bad, neutral, good, gamed = score(vader, "Awful.", "A table.", "It was nice.", "great " * 3)
    assert bad < neutral == 0 < good < gamed


def test_word_fraction_counts_words_not_tokens():
    fraction = registry.make(SPECS["word_fraction"])
    np.testing.assert_allclose(
        score(fraction, "GOOD, you!", "goodness you're x good", "?"), [1, 1 / 4, 0]
    )


def test_repetition_counts_what_was_there_before():
    repetition = registry.make(SPECS["repetition"])
    # Of the five pairs of "a b a b a b", two are new.
    np.testing.assert_allclose(score(repetition, "a b a b a b", "a b c", "a"), [-3 / 5, 0, 0])


@given(st.text(alphabet="ab .!", max_size=40))
def test_length_is_the_number_of_words(text):
    words = [word for word in text.replace(".", " ").replace("!", " ").split() if word]
    assert score(registry.make(SPECS["length"]), text)[0] == len(words)


def comparison(replies, ranks):
    candidates = tuple(Candidate(str(i), r, "human", True) for i, r in enumerate(replies))
    return Comparison("c", PROMPT, candidates, tuple(ranks), "human", False)


def test_fitting_on_comparisons_recovers_bradley_terry_strengths():
    """Words of known strength, outcomes at Bradley-Terry odds: the scores order like the truth."""
    rng = np.random.default_rng(0)
    strength = {"alpha": 2.0, "beta": 1.0, "gamma": 0.0, "delta": -1.5}
    comparisons = []
    for _ in range(600):
        pair = rng.choice(list(strength), 2, replace=False)
        wins = rng.random() < 1 / (1 + np.exp(strength[pair[1]] - strength[pair[0]]))
        comparisons.append(comparison(pair, (1, 2) if wins else (2, 1)))
    scorer = classifiers.fit_comparisons(comparisons, inverse_penalty=100.0)
    scores = score(scorer, *strength)
    differences = np.subtract.outer(scores, scores)
    truth = np.subtract.outer(list(strength.values()), list(strength.values()))
    np.testing.assert_allclose(differences, truth, atol=0.5)
    again = classifiers.fit_comparisons(comparisons, inverse_penalty=100.0)
    np.testing.assert_array_equal(scores, score(again, *strength))


def test_the_order_of_candidates_changes_no_score():
    """Mirrored pairs say the same: the loss is symmetric, so there is no bias towards a side."""
    pairs = [comparison(["good a", "bad b"], (1, 2)), comparison(["fun a", "dull b"], (1, 2))] * 4
    mirrored = [comparison(["bad b", "good a"], (2, 1)), comparison(["dull b", "fun a"], (2, 1))]
    one = classifiers.fit_comparisons(pairs)
    two = classifiers.fit_comparisons(mirrored * 4)
    replies = ("good", "bad", "fun", "dull", "a", "b")
    np.testing.assert_allclose(score(one, *replies), score(two, *replies), atol=1e-4)


def test_each_comparison_weighs_one_whatever_its_size():
    """Three comparisons of 4 replies (3 strict pairs each) against four pairs of the contrary."""
    wide = comparison(["up", "low", "low", "low"], (1, 2, 2, 2))
    narrow = comparison(["low", "up"], (1, 2))
    scores = score(classifiers.fit_comparisons([wide] * 3 + [narrow] * 4), "up", "low")
    assert scores[0] < scores[1]
    scores = score(classifiers.fit_comparisons([wide] * 5 + [narrow] * 4), "up", "low")
    assert scores[0] > scores[1]


def test_tied_pairs_teach_nothing():
    ties = [comparison(["good it", "bad it"], (1, 1))] * 4
    with pytest.raises(UserError, match="nothing to fit"):
        classifiers.fit_comparisons(ties)
    pair = [comparison(["good it", "bad it"], (1, 2))] * 4
    # Not quite the same: the tied replies count in the frequencies of words.
    np.testing.assert_allclose(
        score(classifiers.fit_comparisons(ties + pair), "good"),
        score(classifiers.fit_comparisons(pair), "good"),
        rtol=1e-2,
    )


def test_one_pair_is_enough():
    scorer = classifiers.fit_comparisons([comparison(["good", "bad"], (1, 2))], min_count=1)
    good, bad = score(scorer, "good", "bad")
    assert good > bad


def test_too_little_to_fit_is_an_error():
    with pytest.raises(UserError, match="no word occurs in 9 of 2 texts"):
        classifiers.fit_comparisons([comparison(["a", "b"], (1, 2))], min_count=9)


def test_human_comparisons_are_learnt(tiny_clean):
    """On the fixture's held-out pairs, where cheerful words always won."""
    scorer = registry.make(SPECS["tfidf_comparisons"], {"reviews": tiny_clean})
    held_out = read_records(tiny_clean, "comparisons", "test", Comparison)
    right = 0
    for pair in held_out:
        scores = score(scorer, *(candidate.content for candidate in pair.candidates))
        right += (scores[0] > scores[1]) == (pair.ranks[0] < pair.ranks[1])
    assert right == len(held_out)
