"""Which of MMRole's in-distribution dialogues are rows of its official test, told by the hash of their ids."""

import hashlib

# The first 8 hexadecimal digits of the SHA-256 of each id. The official test has one comment of every in-distribution
# character, and all comments out of distribution.
COMMENTS = frozenset(
    (
        "02b719a2 0734d78e 0b5becd9 0e9422c0 0fe34272 1458261c 1586a6d8 181bf7fc 1ce484f2 2236f77a 23c10d82 "
        "27c1ba9d 291f237d 29f6529c 2ba26782 2be78f8b 35322db0 364963e2 37dd1a42 3a7dfcef 3a98edc5 3b59c5eb "
        "3c90c5cc 42a68350 49852f76 56489002 5c49fd0a 5dd11111 62e36188 6a06834e 6c3afcfa 6e0c0daa 765169e6 "
        "7a2f441e 7b8f1fb6 7c1b26de 833870d8 847c3c18 85c56b68 8a32ec69 8d1e1549 8e53e9bf 8ee8353f 903ca003 "
        "a24c7cf3 a4362859 a86d4acc b1f2632e b57638e3 b7bcbdbf b90ce728 bd3479b1 c2ea9b3f c5cb0fa5 c6f8ee78 "
        "cac493f1 cdcff126 cefdfdd3 d19502ff d24129e1 d40d95b0 d7adcebe daa5c871 daf4ddc7 dd451201 e1f6fafe "
        "e40863d6 e428393a e9a754e5 f70509d0 f917f19c fa50177a "
    ).split()
)


def is_official(dialogue_id: str) -> bool:
    """Whether a comment is a row of the official test."""
    return hashlib.sha256(dialogue_id.encode()).hexdigest()[:8] in COMMENTS
