"""What mkdocs does to pages of the site: files of the repository that are not on it are named, not linked."""

import re

# A link from a page of `docs` to a file beside that folder.
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:benchmarks|examples|model_cards|tests)[^)#\s]*)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Called by mkdocs with the text of each page."""
    return OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
