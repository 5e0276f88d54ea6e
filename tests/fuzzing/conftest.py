"""`pytest tests/fuzzing --hypothesis-profile=thousands` tries 3,000 cases of each test."""

from hypothesis import settings

settings.register_profile("thousands", max_examples=3000, deadline=None)
