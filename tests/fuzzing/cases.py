"""How many cases the tests of this folder try."""

from hypothesis import HealthCheck, settings


def cases(few: int) -> settings:
    """`few` cases, or those of the profile `thousands`."""
    profile = settings.default.max_examples
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=profile if profile > 1000 else few, deadline=None, suppress_health_check=slow)
