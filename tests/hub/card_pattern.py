"""What a generated model card looks like, from its first line to its last."""

import re

_TABLE = r"\| .+ \|\n\|(?:---\|)+\n(?:\| .* \|\n?)+"
SECTIONS = [
    r"---\n",
    r"(?:base_model: \S+\n)?",
    r"(?:datasets:\n(?:- \S+/\S+\n)+)?",
    r"(?:language: \S+\n)?",
    r"library_name: latent-trl\n",
    r"license: \S+\n(?:license_name: \S+\n)?",
    r"pipeline_tag: (?:image-text-to-text|text-generation)\n",
    r"tags:\n- latent-actions\n(?:- \S+\n)*",
    r"(?:model-index:\n- name: .+\n  results:\n(?:  .+\n)+)?",
    r"---\n\n",
    r"# .+\n\n",
    r"(?:A latent action space for a (?:vision-)?language model: .+|Components of a latent action model, .+)\n\n",
    r"(?:There is no policy here: .+\n\n)?",
    rf"## Components\n\n{_TABLE}\n\nAll weights are safetensors\.\n\n",
    r"## How to use\n\n(?:The base model: .+\n\n)?(?:```python\n(?:.*\n)+?```|Load each component .+)\n\n",
    r"## Training\n\n(?:No record of the training .+\n|(?:\d+\. \*\*.+\*\* trained .+\n)+)\n",
    r"(?:!\[Losses, rewards .+\]\(training_curves\.png\)\n\n|Plots are left out: .+\n\n)?",
    r"## Codebook\n\n(?:In .+: \*\*\d+ of \d+ codes\*\* in use, perplexity \*\*[\d.]+\*\*, \d+ dead codes.*"
    r"|When it was last logged, .+|How often each code is used was not measured\.)\n\n",
    r"(?:!\[How often each code was chosen\]\(codebook_usage\.png\)\n\n|Plots are left out: .+\n\n)?",
    rf"(?:The codes most used:\n\n{_TABLE}\n\n)?",
    rf"## Evaluation\n\n(?:{_TABLE}|These weights have not been evaluated, .+)\n\n",
    rf"## Hyper-parameters\n\n(?:(?:\d+\. .+\n\n{_TABLE}\n*)+|No settings were kept .+)\n\n",
    r"## Limits\n\n(?:- .+\n)+\n",
    r"## Framework versions\n\n(?:- \S+: \S+\n)+\n",
    r"## Citation\n\n.+\n\n```bibtex\n@inproceedings\{li-etal-2026-controlling,\n(?:.+\n)+```\n",
]
CARD_PATTERN = re.compile("".join(SECTIONS))


def first_mismatch(card: str) -> str | None:
    """Where a card leaves the pattern; `None` if it does not."""
    if CARD_PATTERN.fullmatch(card):
        return None
    for count in range(len(SECTIONS), 0, -1):
        if match := re.match("".join(SECTIONS[:count]), card):
            following = SECTIONS[count] if count < len(SECTIONS) else "the end"
            return f"after {card[: match.end()][-120:]!r} expected {following!r}, got {card[match.end() :][:200]!r}"
    return card[:200]
