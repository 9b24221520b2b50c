"""A reward of tests/test_tune.py: shorter completions are better."""


def brevity(completions, **columns):
    """Minus the number of characters of each."""
    return [-float(len(one)) for one in completions]
