"""Search over codes at inference: the best of N samples, and a small tree search, with any reward function."""

from .candidates import Candidate, SearchResult
from .samples import best_of_n
from .tree import tree_search

__all__ = ["Candidate", "SearchResult", "best_of_n", "tree_search"]
