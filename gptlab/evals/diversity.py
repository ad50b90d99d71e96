"""Whether a policy still says different things: what optimisation of a reward destroys first."""

import collections
from collections.abc import Mapping, Sequence


def equal_token_count(systems: Mapping[str, Sequence[Sequence[int]]]) -> int:
    """The number of tokens that every system can provide: the least total, over its replies.

    The share of distinct n-grams falls with the length of the text, so systems are only
    comparable at the same number of tokens.
    """
    return min(sum(len(reply) for reply in replies) for replies in systems.values())


def distinct_ngrams(replies: Sequence[Sequence[int]], n: int, num_tokens: int) -> float:
    """Distinct n-grams as a share of all n-grams of the first `num_tokens` tokens of all replies.

    Pooled over replies (Li et al. 2016, arXiv 1510.03055): a system that gives one varied reply to
    everything scores low, which a mean over replies would hide. No n-gram spans two replies.

    Args:
      replies: token ids (or words) of each reply, in a fixed order.
      n: 1 for words, 2 for pairs.
      num_tokens: from `equal_token_count`; the reply that exceeds it is cut.

    Returns:
      In [0, 1]; not a number when there is no n-gram.
    """
    seen: set[tuple[int, ...]] = set()
    total, left = 0, num_tokens
    for reply in replies:
        if left <= 0:
            break
        tokens = reply[:left]
        left -= len(tokens)
        for start in range(len(tokens) - n + 1):
            seen.add(tuple(tokens[start : start + n]))
            total += 1
    return len(seen) / total if total else float("nan")


def most_common_reply(replies: Sequence[str]) -> tuple[str, float]:
    """The reply given most often and its share, regardless of case and white space."""
    if not replies:
        return "", float("nan")
    counts = collections.Counter(" ".join(reply.casefold().split()) for reply in replies)
    reply, count = counts.most_common(1)[0]
    return reply, count / len(replies)
